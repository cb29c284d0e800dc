"""What the kernel has learnt by itself, as the NAT table has it: flows like any others."""

import gc
from collections import Counter
from itertools import count
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from knet.endpoint import FlowKey, Proto, Source, flow_key
from krelay.datapath.verdict import Verdict
from krelay.datapath.worker import Worker
from krelay.nat.admission import FlowLimits
from krelay.nat.dnsflows import Beginning, DnsFlows, Exchange
from krelay.nat.flow import BUSY, Flow, Timeouts
from krelay.nat.table import NatTable
from krelay.nat.tcpstate import State
from krelay.steps import Hook, Side, Step
from tests.tools.observing import observe
from tests.tools.packets import addr, at, flow, policy, template

PRE, POST = Hook.PREROUTING, Hook.POSTROUTING
TIMEOUT = 20.0


def table(**limits: int) -> NatTable:
    nat = NatTable(FlowLimits(**limits), Timeouts(udp_dns=TIMEOUT), rng=Random(1))
    nat.dns_flows.learns(frozenset({addr("K"), addr("G")}), addr("S"))
    return nat


def query(client: str = "C:4000", service: str = "K:53", size: int = 60) -> Exchange:
    """What is told of a query."""
    return False, size, flow_key(at(client), at(service))


def answer(client: str = "C:4000", service: str = "K:53", size: int = 90) -> Exchange:
    """What is told of its answer."""
    return True, size, flow_key(at(client), at(service))


def made(text: str) -> bytes:
    """A datagram."""
    return template(text).build()


def only(nat: NatTable) -> Flow:
    (flow,) = nat
    return flow


def figures(flow: Flow) -> tuple[list[int], list[int]]:
    sides = [flow.by(Side.CLIENT), flow.by(Side.SERVER)]
    return [each.packets for each in sides if each], [each.bytes for each in sides if each]


def test_a_query_and_its_answer_are_a_flow() -> None:
    nat = table()
    nat.learning.learn([query(size=60)], 5.0)
    before = only(nat)
    nat.learning.learn([answer(size=90)], 6.0)
    flow = only(nat)

    assert (before.state, flow.state) == (State.UNREPLIED, State.REPLIED)
    assert figures(flow) == ([1, 1], [60, 90])
    assert (flow.client, flow.service, flow.server) == (at("C:4000"), at("K:53"), at("S:53"))
    assert (flow.source, flow.created_at, flow.seen_at) == (Source.CLIENT, 5.0, 6.0)
    assert (len(nat), nat.count(Proto.UDP), nat.count(Proto.TCP)) == (1, 1, 0)
    assert flow.id == before.id
    assert (found := nat.get(flow.id)) is not None
    assert found.client == flow.client


def test_a_flow_is_asked_again_and_its_flow_stays_the_same() -> None:
    nat = table()
    nat.learning.learn([query(), answer(), query()], 1.0)

    assert figures(only(nat))[0] == [2, 1]


def test_a_port_that_asks_again_and_again_gets_a_flow_that_can_be_offloaded() -> None:
    nat = table()
    changed: list[Flow] = []
    observe(nat, changed=changed.append)
    nat.learning.learn([query(), answer()] * (BUSY - 1), 1.0)
    assert (len(nat.dns_flows), changed) == (1, [])
    nat.learning.learn([query(), answer()], 2.0)

    flow = only(nat)
    assert (len(nat.dns_flows), changed) == (0, [flow])
    assert figures(flow)[0] == [BUSY, BUSY]
    assert flow.rewrites[Step.U12].packets >= BUSY


def test_it_goes_when_it_has_been_silent_for_so_long() -> None:
    nat = table()
    nat.learning.learn([query("C:4000"), query("C:4001")], 1.0)
    nat.learning.learn([answer("C:4001")], 15.0)
    nat.expire(1.0 + TIMEOUT - 0.1)
    assert len(nat) == 2
    nat.expire(1.0 + TIMEOUT + 1)
    assert [flow.client.port for flow in nat] == [4001]
    nat.expire(15.0 + TIMEOUT + 1)

    assert len(nat) == nat.dns_flows.of_client(addr("C")) == 0


@pytest.mark.parametrize(
    "coming",
    ["S:53 > C:4000", "C:4000 > K:53"],
    ids=["a second answer", "a question"],
)
def test_a_packet_that_the_worker_must_decide_about_makes_it_a_flow_of_the_tables(
    coming: str,
) -> None:
    nat = table()
    nat.learning.learn([query(), answer()], 1.0)
    shown = only(nat)
    wanted = flow(coming)
    adopted = nat.learning.adopt(flow_key(wanted.src, wanted.dst), 1.0)

    assert adopted is not None
    assert (adopted.id, figures(adopted), len(nat), len(nat.dns_flows)) == (
        shown.id,
        figures(shown),
        1,
        0,
    )
    assert (
        nat.tables[PRE, Proto.UDP][flow_key(at("C:4000"), at("K:53"))] is adopted.rewrites[Step.U12]
    )
    nat.end(adopted)
    assert len(nat) == 0
    assert not any(nat.tables.values())


def test_nobody_elses_packet_makes_it_one() -> None:
    nat = table()
    nat.learning.learn([query()], 1.0)

    for other in ("Z:53 > C:4000", "S:53 > C:4001", "S:54 > C:4000", "S:53 > D:4000"):
        wanted = flow(other)
        assert nat.learning.adopt(flow_key(wanted.src, wanted.dst), 1.0) is None
    assert len(nat.dns_flows) == 1


def test_the_worker_knows_it_when_a_second_answer_or_query_comes() -> None:
    nat = table()
    worker = Worker(nat)
    worker.policy = policy()
    # They are told of, and not read yet.
    told = [query("C:4000"), answer("C:4000"), query("C:4001")]

    def read() -> None:
        exchanges, told[:] = told.copy(), []
        nat.learning.learn(exchanges, 1.0)

    observe(nat, needs_queries=read)

    got = worker.handle(made("S:53 > C:4000"), POST, 1.0)
    assert got == made("K:53 > C:4000")
    got = worker.handle(made("C:4001 > K:53"), PRE, 1.0)
    assert got == made("C:4001 > S:53")
    assert [figures(flow)[0] for flow in nat] == [[1, 2], [2, 0]]
    assert worker.handle(made("S:53 > C:4002"), POST, 1.0) is Verdict.PASS


def test_a_clients_own_conversation_from_the_same_port_is_moved() -> None:
    nat = table()
    nat.learning.learn([query()], 1.0)
    rewrite = nat.saw_direct(Proto.UDP, at("C:4000"), at("S:53"), 1.0)

    assert rewrite is not None
    assert rewrite.step is Step.D1
    assert rewrite.src.port != 4000


def test_a_port_that_was_learnt_is_not_free() -> None:
    nat = table()
    nat.learning.learn([query(service="K:53")], 1.0)
    flow = nat.open_forwarded(Proto.UDP, at("C:4000"), at("G:53"), at("S:53"), Source.CLIENT, 1.0)

    assert flow.rewrites[Step.U12].src.port != 4000


def test_a_flow_of_the_worker_takes_what_the_kernel_tells_of_it() -> None:
    nat = table()
    flow = nat.open_forwarded(Proto.UDP, at("C:4000"), at("K:53"), at("S:53"), Source.CLIENT, 1.0)
    nat.learning.learn([query(size=60), answer(size=90)], 2.0)

    assert figures(flow) == ([1, 1], [60, 90])
    assert (flow.state, flow.seen_at, len(nat.dns_flows)) == (State.REPLIED, 2.0, 0)


def gone(nat: NatTable) -> list[int]:
    """The client's port of each query whose answer is to go to the worker, as that is told."""
    ports: list[int] = []
    observe(nat, query_gone=lambda key: ports.append(FlowKey.unpack(key).src.port))
    return ports


def test_the_kernel_answers_no_query_whose_flow_has_gone() -> None:
    nat = table()
    ports = gone(nat)
    nat.learning.learn([query("C:1"), query("C:2"), answer("C:2"), query("C:3")], 1.0)
    nat.learning.learn([query("C:4"), query("C:4"), answer("C:4")], 1.0)
    assert ports == []
    key = flow_key(at("C:3"), at("K:53"))
    assert nat.learning.adopt(key, 1.0) is not None
    assert ports == [3]
    nat.expire(1.0 + TIMEOUT + 1)
    assert ports == [3, 1, 4], "2 has been answered, of 4 one query hasn't"


def test_nor_one_that_the_worker_has_a_flow_for_or_that_finds_no_room() -> None:
    nat = table(flows_per_client=1)
    ports = gone(nat)
    nat.open_forwarded(Proto.UDP, at("C:1"), at("K:53"), at("S:53"), Source.CLIENT, 1.0)
    for each in nat.workers:
        each.spoke_again, each.answered_at = True, 1.0  # so it doesn't go for another
        nat.admission.confirmed(each)
    nat.learning.learn([query("C:1"), query("C:2")], 1.0)
    assert ports == [1, 2]


def test_who_has_a_conversation_of_its_own_is_told_of() -> None:
    nat = table()
    told: list[str] = []
    observe(nat, began_own=lambda proto, end: told.append(f"{proto.name} {end}"))
    nat.saw_direct(Proto.UDP, at("C:1"), at("S:53"), 1.0)
    nat.saw_own(Proto.UDP, at("K:53"), at("D:53"), 1.0)
    nat.saw_own(Proto.TCP, at("K:443"), at("D:5"), 1.0)
    assert told == [f"UDP {at('C:1')}", f"UDP {at('D:53')}", f"TCP {at('D:5')}"]


def test_an_answer_of_which_nothing_is_known_is_let_be() -> None:
    nat = table()
    nat.learning.learn([answer()], 1.0)

    assert len(nat) == 0


def test_what_was_shown_is_let_go_without_a_collector() -> None:
    nat = table()
    nat.learning.learn([query()], 1.0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(100):
            assert len(list(nat)) == 1
        assert gc.collect() == 0
    finally:
        gc.enable()


def test_what_was_shown_can_be_ended() -> None:
    nat = table()
    nat.learning.learn([query("C:4000"), query("C:4001")], 1.0)
    shown = list(nat)
    nat.end(shown[0])
    assert [flow.id for flow in nat] == [shown[1].id]
    nat.end(shown[0])
    nat.learning.learn([query("C:4000")], 1.0)
    nat.end(shown[0])  # of another flow between the same ports
    assert len(nat) == 2

    nat.clear()
    assert len(nat) == 0


def test_the_oldest_make_room_within_the_limits() -> None:
    nat = table(flows=3, flows_per_client=2)
    nat.learning.learn([query("C:1001"), query("C:1002"), query("C:1003")], 1.0)
    assert [flow.client.port for flow in nat] == [1002, 1003]
    nat.learning.learn([query("D:1001"), query("D:1002")], 2.0)
    assert [str(flow.client.port) for flow in nat] == ["1003", "1001", "1002"]
    assert nat.admission.evicted == 2
    nat.open_tcp(at("N:5000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 3.0)

    assert (len(nat), nat.admission.evicted) == (3, 3)


def test_a_query_asked_twice_at_a_time_takes_one_place() -> None:
    nat = table(flows=2)
    nat.learning.learn([query("C:1001"), query("C:1002")], 1.0)
    nat.learning.learn([query("C:1003"), query("C:1003"), answer("C:1003")], 2.0)

    assert [(flow.client.port, figures(flow)[0]) for flow in nat] == [
        (1002, [1, 0]),
        (1003, [2, 1]),
    ]
    assert nat.admission.evicted == 1


def test_a_clients_flows_count_with_what_is_learnt_of_it() -> None:
    nat = table(flows_per_client=2)
    flow = nat.open_forwarded(Proto.UDP, at("C:5000"), at("K:7"), at("S:7"), Source.CLIENT, 1.0)
    flow.spoke_again = True
    nat.learning.learn([query("D:1001"), query("C:1001"), query("C:1002")], 1.0)

    assert [flow.client for flow in nat] == [at("C:5000"), at("D:1001"), at("C:1002")]


@given(
    st.lists(st.tuples(st.sampled_from("CDG"), st.integers(1001, 1004)), max_size=30),
    st.integers(1, 5),
    st.integers(1, 5),
)
@example([("C", 1001), ("C", 1002), ("C", 1003), ("D", 1001)], 3, 1)
@example([*[("C", 1001)] * BUSY, ("C", 1002), ("D", 1001)], 2, 1)  # C has a flow, and gets no more
def test_it_does_not_matter_how_many_queries_come_at_a_time(
    script: list[tuple[str, int]], flows: int, flows_per_client: int
) -> None:
    queries = [query(f"{client}:{port}") for client, port in script]
    together, singly = (table(flows=flows, flows_per_client=flows_per_client) for _ in range(2))
    together.learning.learn(queries, 1.0)
    for each in queries:
        singly.learning.learn([each], 1.0)

    for nat in (together, singly):
        assert len(nat) <= flows
        assert (
            max(Counter(flow.client.addr for flow in nat).values(), default=0) <= flows_per_client
        )
    assert [(flow.id, flow.client, figures(flow)) for flow in together] == [
        (flow.id, flow.client, figures(flow)) for flow in singly
    ]
    assert together.admission.evicted == singly.admission.evicted


def test_where_flows_fill_the_table_nothing_is_learnt() -> None:
    nat = table(flows=1)
    flow = nat.open_tcp(at("N:5000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 3.0)
    flow.accepted = True
    nat.learning.learn([query()], 1.0)

    assert only(nat) is flow


def test_unanswered_ones_are_found_and_those_of_another_server() -> None:
    nat = table()
    nat.learning.learn([query("C:1001"), query("C:1002"), answer("C:1002")], 1.0)
    nat.dns_flows.learns(frozenset({addr("K")}), addr("Z"))
    nat.learning.learn([query("C:1003")], 2.0)

    assert [flow.client.port for flow in nat.unanswered()] == [1001, 1003]
    assert [flow.client.port for flow in nat.elsewhere(addr("Z"))] == [1001, 1002]


@given(
    st.lists(
        st.tuples(st.sampled_from(["begin", "hear", "oldest", "oldest of"]), st.integers(0, 5)),
        max_size=60,
    )
)
def test_learnt_flows_are_as_a_list_would_have_them(script: list[tuple[str, int]]) -> None:
    flows = DnsFlows(count(1), (), {}, 100, lambda query: None)
    model: dict[bytes, float] = {}
    now = 0.0
    for verb, number in script:
        now += 1.3
        query = bytes((number % 2,)) * 4 + bytes((number,)) * 8
        known = flows.get(query)
        assert (known is not None) == (query in model)
        if (verb == "begin" and known is None) or (verb == "hear" and known is not None):
            assert (
                flows.hear(iter([(False, 60, query)]), now, Beginning(now + 10, 1, 6, False))
                is None
            )
            model[query] = now
        elif verb == "oldest":
            assert flows.remove_oldest() == bool(model)
            model.pop(next(iter(model), b""), None)
        elif verb == "oldest of":
            theirs = [each for each in model if each[:4] == query[:4]]
            assert flows.remove_oldest(query[:4]) == bool(theirs)
            if theirs:
                del model[theirs[0]]
        flows.expire(now, 10)
        # Looked at by the second, so up to one late.
        gone = {each for each, heard in model.items() if flows.get(each) is None}
        assert all(model[each] + 10 <= now for each in gone)
        model = {each: heard for each, heard in model.items() if each not in gone}
        assert all(heard + 11 > now for heard in model.values())
        assert len(flows) == len(model)
        for client in (bytes(4), b"\x01" * 4):
            assert flows.of_client(client) == sum(each[:4] == client for each in model)
