"""The table of flows: expiry against two plain lists, ports, limits, and nothing left behind."""

from collections import Counter
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.endpoint import Endpoint, Proto, Source, flow_key
from knet.ratelimit import PerClientLimiter
from knet.timerwheel import Wheel
from krelay.nat.admission import FlowLimits, Refusal
from krelay.nat.direct import DirectFlows
from krelay.nat.dnsflows import DnsFlows
from krelay.nat.eviction import Spare
from krelay.nat.expiry import HORIZON
from krelay.nat.flow import CLOSED_LINGER, Flow, Footprint, Timeouts
from krelay.nat.mappings import PortTaken
from krelay.nat.ports import RelayPorts
from krelay.nat.table import NatTable
from krelay.nat.tcpstate import State
from krelay.steps import SIDES, Hook, Side, Step
from tests.tools.observing import observe
from tests.tools.packets import ACK, FIN, PSH, RST, SYN, addr, at

K80, K443, K53 = at("K:80"), at("K:443"), at("K:53")
S80, S443, S53 = at("S:80"), at("S:443"), at("S:53")
SHORT = Timeouts(udp=30, udp_dns=5, tcp_transitory=10, tcp_established=60)


def table(**limits: int) -> NatTable:
    return NatTable(FlowLimits(**limits), rng=Random(1))


def open_tcp(nat: NatTable, client: str = "C:40000", now: float = 0, port: int = 80) -> Flow:
    there, server = Endpoint(K80.addr, port), Endpoint(S80.addr, port)
    return nat.open_tcp(at(client), there, server, Source.CLIENT, 16000, now)


def open_udp(
    nat: NatTable, client: str = "C:4000", now: float = 0, source: Source = Source.CLIENT
) -> Flow:
    return nat.open_forwarded(Proto.UDP, at(client), K53, S53, source, now, relay_addr=K53.addr)


TFTP_CLIENTS = (Source.CLIENT, "C:6900", "C:6900"), (Source.RELAY, "C:6901", "K:6901")


def open_tftp(
    nat: NatTable, client: str = "C:6900", source: Source = Source.CLIENT, service: str = "K:69"
) -> Flow:
    server = at("S:0")._replace(port=at(service).port)
    return nat.open_forwarded(
        Proto.UDP, at(client), at(service), server, source, 0, relay_addr=K53.addr, any_port=True
    )


def confirm(flow: Flow) -> Flow:
    """Both its ends take part for certain."""
    flow.accepted = flow.spoke_again = True
    return flow


def held(value: Any) -> int:
    """How many things are in a container, counting those in its containers."""
    match value:
        case dict():
            return len(value) + sum(map(held, value.values()))
        case list():
            return len(value)
        case DirectFlows():
            return held(value._seen) - len(Proto)
        case RelayPorts() | Spare() | Wheel() | DnsFlows():
            return len(value)
        case PerClientLimiter():
            return held(value._paid_until)
        case _:
            return 0


def left_behind(nat: NatTable) -> dict[str, int]:
    """Every table of the table that isn't empty.  (Those by hook and by protocol are fixed.)"""
    protos = len(Proto)
    fixed = {"tables": len(Hook) * protos, "_outside": protos, "_relay_ports": protos}
    parts = (nat, nat.admission, nat.mappings, nat.expiry)
    tables = {name: value for part in parts for name, value in vars(part).items()}
    for elsewhere in ("_direct", "_dns_flows", "_flows"):  # the table's own, by other names
        del tables[elsewhere]
    sizes = {name: held(value) - fixed.get(name, 0) for name, value in tables.items()}
    return {name: size for name, size in sizes.items() if size}


def busy() -> NatTable:
    """A table with flows of every kind, also some that took others' places."""
    nat = table(new_flows_per_client=1000)
    for port in range(40000, 40010):
        flow = open_tcp(nat, f"C:{port}")
        nat.attach(flow, Endpoint(K80.addr, port + 5000), 0)
    nat.attach(flow, at("K:50000"), 0)  # once more, from another port
    open_tcp(nat, "C:40000", port=443)
    open_tcp(nat, "D:40000")
    nat.saw_direct(Proto.TCP, at("C:45000"), S80, 0)
    nat.saw_direct(Proto.TCP, at("C:33333"), S80, 0)
    nat.close(next(iter(nat)), 0)
    open_tcp(nat, "C:40000")  # in place of the closed one
    for source in Source:
        for port in range(4000, 4004):
            open_udp(nat, f"C:{port}", source=source)
    nat.saw_direct(Proto.UDP, at("C:4000"), S53, 0)
    for source, client, seen in TFTP_CLIENTS:
        open_tftp(nat, client, source)
        assert nat.answered_elsewhere(at("S:7000"), at(seen), 0)
    over = nat.open_forwarded(Proto.TCP, at("C:45000"), K80, S80, Source.CLIENT, 0)
    over.tracker.reset = True
    nat.tracking.changed(over)
    return nat


# Nothing is left behind


def test_the_busy_table_fills_every_table() -> None:
    """What the tests below find empty was not empty before."""
    assert set(left_behind(busy())) == {
        "tables", "direct", "footprints", "flows", "_of_others", "_of_relayed", "_closed",
        "_outside", "_inside", "_by_relay", "_asked_by", "_due", "_relay_ports", "_datagrams",
        "_relayed", "_forwarded", "_over", "_new_flows",
    }  # fmt: skip


def test_clearing_leaves_nothing() -> None:
    nat = busy()
    flows = list(nat)

    assert nat.clear() == flows
    assert left_behind(nat) == {}
    assert len(nat) == 0


def test_expiry_of_everything_leaves_nothing() -> None:
    nat = busy()
    for now in range(0, 8000, 7):
        nat.expire(now)

    assert left_behind(nat) == {}


def test_expiry_after_a_long_sleep_leaves_nothing_that_matters() -> None:
    nat = busy()
    for now in (1_000_000, 1_000_001):
        nat.expire(now)

    assert left_behind(nat) == {}


def test_flows_that_end_early_leave_nothing_once_the_horizon_is_over() -> None:
    """Entries for the far future of flows long gone would pile up with every short connection."""
    nat = table()
    for now in range(100):
        flow = open_tcp(nat, now=now)
        flow.tracker.resumed()
        nat.expiry.schedule(flow)
        nat.close(flow, now)
        nat.end(flow)
        nat.expire(now)
        assert len(nat.expiry._due) <= 4 * HORIZON

    nat.expire(100 + HORIZON)
    assert left_behind(nat) == {}


def test_ending_each_flow_leaves_only_what_clients_did_themselves() -> None:
    nat = busy()
    for flow in nat:
        nat.end(flow)
        nat.end(flow)  # harmless

    assert set(left_behind(nat)) == {"direct", "_due", "_new_flows"}
    nat.expire(HORIZON + 1)
    assert set(left_behind(nat)) == {"direct"}


def test_a_refused_flow_leaves_nothing() -> None:
    nat = table(flows=0)
    for refused in (open_tcp, open_udp):
        with pytest.raises(Refusal):
            refused(nat)

    assert left_behind(nat) == {}


def test_a_flow_that_ended_holds_on_to_none_of_its_rewrites() -> None:
    nat = table()
    flow = open_tcp(nat)
    nat.end(flow)

    assert flow.rewrites == {}


# Expiry


@dataclass
class Known:
    """What the twin knows of a flow: the facts from which its life follows."""

    flow: Flow
    seen: float
    client_acked: bool = False
    server_answered: bool = False
    fins: int = 0  # bits: client, server
    reset: bool = False
    reset_at: float = 0
    closed_at: float | None = None

    def expires(self) -> float:
        if self.closed_at is not None:
            return self.closed_at + CLOSED_LINGER
        if self.flow.proto is Proto.UDP:
            return self.seen + (SHORT.udp_dns if self.flow.service.port == 53 else SHORT.udp)
        open_ = self.client_acked and self.server_answered and self.fins != 3 and not self.reset
        if open_:
            return self.seen + SHORT.tcp_established
        return max(self.seen, self.reset_at) + SHORT.tcp_transitory


ops = st.one_of(
    st.tuples(st.just("tcp"), st.integers(0, 3)),
    st.tuples(st.just("udp"), st.integers(0, 3)),
    st.tuples(st.just("other_udp"), st.integers(0, 3)),
    st.tuples(st.just("close"), st.integers(0, 9)),
    st.tuples(st.just("wait"), st.sampled_from((0.1, 0.9, 1, 4, 9.5, 11, 29, 61, 1000))),
    st.tuples(
        st.sampled_from(("client", "server", "to_client", "to_server")),
        st.tuples(st.integers(0, 9), st.sampled_from((SYN, SYN | ACK, ACK, PSH | ACK, FIN, RST))),
    ),
)


@given(script=st.lists(ops, max_size=60), begin=st.sampled_from((0.0, 0.5, 1e6 + 0.3)))
def test_flows_live_as_long_as_in_two_plain_lists(
    script: list[tuple[str, Any]], begin: float
) -> None:
    nat = NatTable(timeouts=SHORT, rng=Random(1))
    now = begin
    alive: list[Known] = []
    for verb, what in script:
        match verb:
            case "wait":
                now += what
            case "tcp":
                flow = open_tcp(nat, f"C:{40000 + what}", now)
                nat.attach(flow, Endpoint(K80.addr, 45000 + flow.id), now)
                alive.append(Known(flow, now))
            case "udp" | "other_udp":
                service = K53 if verb == "udp" else at("K:5000")
                client = Endpoint(addr("D"), 4000 + what)
                flow = nat.open_forwarded(Proto.UDP, client, service, S53, Source.CLIENT, now)
                alive.append(Known(flow, now))
            case "close" if what < len(alive) and alive[what].flow.proto is Proto.TCP:
                nat.close(alive[what].flow, now)
                alive[what].closed_at = alive[what].closed_at or now
            case "client" | "server" | "to_client" | "to_server" if what[0] < len(alive):
                _packet(nat, alive[what[0]], verb, what[1], now)

        ended = nat.expire(now)

        gone = [known for known in alive if nat.get(known.flow.id) is None]
        assert {known.flow.id for known in gone} == {flow.id for flow in ended}
        for known in gone:
            assert known.expires() <= now
        alive = [known for known in alive if nat.get(known.flow.id) is not None]
        for known in alive:
            assert now < known.expires() + 2
    assert len(nat) == len(alive)


def _packet(nat: NatTable, known: Known, who: str, flags: int, now: float) -> None:
    """As the worker takes note of a packet."""
    flow, side = known.flow, Side[who.upper()]
    own = {Side.TO_CLIENT: Step.T2, Side.TO_SERVER: Step.T3}
    rewrite = flow.rewrites.get(own[side]) if side in own else flow.by(side)
    if rewrite is None:
        return
    rewrite.packets += 1
    is_tcp = flow.proto is Proto.TCP
    if is_tcp:
        before = flow.tracker.state
        flow.tracker.saw(side, flags)
        if flags & RST and side in own and not known.reset:
            flow.reset_at = known.reset_at = now
        if flow.tracker.state is not before:
            nat.expiry.schedule(flow)
        if side in own:
            known.reset |= bool(flags & RST)
            if not flags & RST:
                known.fins |= (flags & FIN) * (1 if side is Side.TO_SERVER else 2)
        elif not flags & RST:
            known.reset = False
            known.client_acked |= side is Side.CLIENT and bool(flags & ACK)
            known.server_answered |= side is Side.SERVER and bool(flags & (SYN | ACK))
    if not is_tcp or not flags & RST:
        rewrite.seen_at = now
        if side not in own:
            known.seen = now


@pytest.mark.parametrize(
    ("opened", "timeout"),
    [
        (lambda nat: open_udp(nat), 20),
        (
            lambda nat: nat.open_forwarded(
                Proto.UDP, at("C:1"), at("K:123"), at("S:123"), Source.CLIENT, 0
            ),
            300,
        ),
        (lambda nat: open_tcp(nat), 240),
        (lambda nat: _established(nat), 7440),
    ],
    ids=["dns", "udp", "transitory", "established"],
)
def test_the_default_timeouts_are_those_of_the_contract(opened: Any, timeout: int) -> None:
    nat = table()
    flow = opened(nat)

    assert flow.expires_at(nat.timeouts) == timeout
    assert nat.expire(timeout - 0.5) == []
    assert nat.expire(timeout + 1.5) == [flow]


def _established(nat: NatTable) -> Flow:
    flow = open_tcp(nat)
    flow.tracker.resumed()
    nat.expiry.schedule(flow)
    return flow


def test_other_timeouts_are_in_force_at_once_also_for_flows_that_live() -> None:
    nat = table()
    short, long = open_udp(nat), _established(nat)
    nat.expire(10)

    nat.timeouts = SHORT

    assert nat.timeouts == SHORT
    assert nat.expire(10) == []
    assert nat.expire(11) == [short]
    assert nat.expire(61) == [long]


def test_longer_timeouts_let_flows_live_longer() -> None:
    nat = table()
    flow = open_udp(nat)
    nat.timeouts = Timeouts(udp_dns=1000)

    assert nat.expire(999) == []
    assert nat.expire(1001) == [flow]


def test_a_closed_flow_lingers_from_when_it_was_closed_first() -> None:
    nat = table()
    flow = open_tcp(nat)
    nat.close(flow, 5)
    nat.close(flow, 10)

    assert flow.state is State.CLOSED
    assert nat.expire(14.9) == []
    assert nat.expire(16) == [flow]


def test_closing_a_flow_that_has_ended_is_harmless() -> None:
    nat = table()
    flow = open_tcp(nat)
    nat.end(flow)
    nat.close(flow, 1)

    assert set(left_behind(nat)) <= {"_due"}


def test_a_direct_conversation_is_forgotten_when_it_has_been_silent_for_hours() -> None:
    nat = table()
    nat.saw_direct(Proto.TCP, at("C:45678"), S80, 0)
    at_server = (Proto.TCP, flow_key(at("C:45678"), S80))

    nat.expire(7440)
    assert at_server in nat.direct
    nat.expire(7441)
    assert at_server not in nat.direct


def test_a_direct_query_is_forgotten_sooner_than_a_connection() -> None:
    nat = table()
    nat.saw_direct(Proto.UDP, at("C:4000"), S53, 0)
    at_server = (Proto.UDP, flow_key(at("C:4000"), S53))

    nat.expire(300)
    assert at_server in nat.direct
    nat.expire(301)
    assert at_server not in nat.direct


def test_a_server_stays_heard_when_its_leg_is_given_up(nat: NatTable) -> None:
    flow = open_tcp(nat)
    nat.attach(flow, at("K:45678"), 0)
    back = flow.rewrites[Step.T4]
    back.packets, back.seen_at = 1, 100.0

    nat.detach(flow)
    assert flow.seen_at == 100
    nat.tracking.heard(back, 1, 40, 101)  # what the kernel has counted is told later
    assert flow.seen_at == 101


def test_a_refused_second_attach_leaves_the_server_leg() -> None:
    nat = table()
    flow, other = open_tcp(nat), open_tcp(nat, "C:40001")
    nat.attach(flow, at("K:45678"), 0)
    nat.attach(other, at("K:45679"), 0)
    before = dict(flow.rewrites)

    with pytest.raises(PortTaken):
        nat.attach(flow, at("K:45679"), 1)
    assert flow.rewrites == before
    assert nat.mappings.of_relay_port(at("K:45678")) is flow


def test_a_port_used_again_towards_another_service_comes_in_from_another_port() -> None:
    """Else the relay's host would take the SYN for a late one of the connection that has ended."""
    nat = table()
    first = open_tcp(nat, "C:40000", port=80)
    nat.close(first, 1)

    assert open_tcp(nat, "C:40000", 2, port=443).inside != first.inside
    assert open_tcp(nat, "C:40000", 2, port=80).inside == first.inside


def test_the_least_recently_seen_direct_conversation_makes_room() -> None:
    direct = DirectFlows(most=2)
    for number in (1, 2, 1, 3):
        direct.saw(Proto.UDP, bytes((number,)), number)

    assert [(Proto.UDP, bytes((n,))) in direct for n in (1, 2, 3)] == [True, False, True]
    assert (Proto.TCP, b"\x01") not in direct


# FlowLimits


def test_flows_are_refused_beyond_the_limit_and_admitted_again_when_one_ends() -> None:
    nat = table(flows=2)
    first, _ = (confirm(each) for each in (open_udp(nat), open_tcp(nat)))
    for refused in (open_tcp, open_udp):
        with pytest.raises(Refusal) as caught:
            refused(nat, "D:1")
        assert caught.value.reason == "table_full"

    nat.end(first)

    assert open_udp(nat, "D:1") in list(nat)


def test_a_client_has_a_share_of_what_tcp_relay_terminates_and_one_of_all_else() -> None:
    nat = table(flows_per_client=1)
    flows = [confirm(each) for each in (open_udp(nat), open_tcp(nat))]

    def forwarded(nat: NatTable, client: str) -> Flow:
        return nat.open_forwarded(Proto.TCP, at(client), K80, S80, Source.CLIENT, 0)

    for refused in (open_tcp, open_udp, forwarded):
        with pytest.raises(Refusal) as caught:
            refused(nat, "C:1")
        assert caught.value.reason == "client_full"
        refused(nat, "D:1")

    nat.close(flows[1], 0)
    open_tcp(nat, "C:1")
    nat.end(flows[0])
    forwarded(nat, "C:1")


def test_lingering_flows_are_no_reason_to_refuse_anyone() -> None:
    nat = table(flows=3)
    flows = [open_tcp(nat, f"C:{port}") for port in (1, 2, 3)]
    nat.close(flows[1], 1)
    nat.close(flows[0], 2)

    open_tcp(nat, "C:4")

    assert nat.get(flows[1].id) is None, "the one closed first makes room"
    assert nat.get(flows[0].id) is flows[0]
    assert len(nat) == 3


@given(
    st.lists(
        st.tuples(st.sampled_from(("open", "close", "end")), st.integers(0, 7), st.booleans()),
        max_size=40,
    )
)
def test_each_clients_flows_are_counted_without_those_closed(
    script: list[tuple[str, int, bool]],
) -> None:
    nat = table()
    for verb, number, tcp in script:
        flows = list(nat)
        match verb:
            case "open":
                client = f"{'CD'[number % 2]}:{1000 + number}"
                open_tcp(nat, client) if tcp else open_udp(nat, client)
            case "close" if number < len(flows):
                nat.close(flows[number], 0)
            case "end" if number < len(flows):
                nat.end(flows[number])

        counts = nat.admission._of_relayed + nat.admission._of_others
        counted = {name: counts[addr(name)] for name in "CD"}
        assert counted == {
            name: sum(flow.client.addr == addr(name) and flow.closed_at is None for flow in nat)
            for name in "CD"
        }


# Ports


@given(wanted=st.integers(1, 0xFFFF), seed=st.integers(0, 99), taken=st.integers(1, 40))
def test_another_port_is_of_the_same_class_and_parity(wanted: int, seed: int, taken: int) -> None:
    nat = NatTable(rng=Random(seed))
    got = []
    for _ in range(taken):
        relay = nat.open_forwarded(
            Proto.UDP, Endpoint(addr("C"), wanted), K53, S53, Source.CLIENT, 0
        )
        got.append(relay.rewrites[Step.U12].src.port)

    assert got[0] == wanted
    assert len(set(got)) == taken
    assert {port < 1024 for port in got} == {wanted < 1024}
    assert {port % 2 for port in got} == {wanted % 2}


class Seven(Random):
    """Wherever the search begins, it must come round to the port just before."""

    def randint(self, a: int, b: int) -> int:
        return 7


def test_when_a_parity_is_used_up_the_other_is_taken_and_then_it_is_refused() -> None:
    nat = NatTable(rng=Seven())
    got = [
        nat.open_forwarded(Proto.UDP, Endpoint(addr("C"), 2), K53, S53, Source.CLIENT, 0)
        for _ in range(1023)
    ]

    ports = [flow.rewrites[Step.U12].src.port for flow in got]
    assert sorted(ports) == list(range(1, 1024))
    assert {port % 2 for port in ports[:511]} == {0}
    with pytest.raises(Refusal) as caught:
        nat.open_forwarded(Proto.UDP, Endpoint(addr("C"), 2), K53, S53, Source.CLIENT, 0)
    assert caught.value.reason == "no_port"


def test_a_port_in_use_by_another_clients_flow_is_free_for_this_one() -> None:
    nat = table()

    for client in ("C:4000", "D:4000"):
        assert open_udp(nat, client).rewrites[Step.U12].src == at(client)


def test_what_leaves_is_told_apart_and_comes_back_to_who_sent_it() -> None:
    """No two flows leave with the same twelve bytes, and each answer's key is one flow's."""
    nat = busy()
    for source in (Step.T3, Step.U12, Step.U2, Step.D1):
        rewrites = [flow.rewrites[source] for flow in nat if source in flow.rewrites]
        leaving = [rewrite.new for rewrite in rewrites]
        assert len(set(leaving)) == len(leaving) > 0


# The server leg


@pytest.fixture
def nat() -> NatTable:
    return table()


def test_a_relay_port_that_another_flow_uses_is_refused_until_that_flow_is_closed(
    nat: NatTable,
) -> None:
    first, second = open_tcp(nat), open_tcp(nat, "C:40001")
    nat.attach(first, at("K:45678"), 0)
    with pytest.raises(PortTaken):
        nat.attach(second, at("K:45678"), 0)

    nat.close(first, 1)
    nat.attach(second, at("K:45678"), 2)

    assert nat.get(first.id) is None
    assert nat.mappings.of_relay_port(at("K:45678")) is second


def test_two_clients_flows_may_not_share_what_the_kernel_could_not_bind(nat: NatTable) -> None:
    """With source=client the outsides differ: the same relay port is another client's port."""
    first, second = open_tcp(nat), open_tcp(nat, "D:40000")
    nat.attach(first, at("K:45678"), 0)
    nat.attach(second, at("K:45679"), 0)

    assert nat.mappings.of_relay_port(at("K:45678")) is first
    assert nat.mappings.of_relay_port(at("K:45679")) is second


def test_attaching_again_moves_the_server_leg_and_forgets_the_old(nat: NatTable) -> None:
    flow = open_tcp(nat)
    nat.attach(flow, at("K:45678"), 0)
    nat.attach(flow, at("K:45679"), 0)

    assert nat.mappings.of_relay_port(at("K:45678")) is None
    assert nat.mappings.of_relay_port(at("K:45679")) is flow
    assert len(nat.tables[Hook.POSTROUTING, Proto.TCP]) == 2
    assert len(nat.tables[Hook.PREROUTING, Proto.TCP]) == 2
    nat.end(flow)
    assert set(left_behind(nat)) <= {"_due"}


def test_attaching_again_from_the_same_port_changes_nothing(nat: NatTable) -> None:
    flow = open_tcp(nat)
    nat.attach(flow, at("K:45678"), 0)
    nat.attach(flow, at("K:45678"), 0)

    assert nat.mappings.of_relay_port(at("K:45678")) is flow


def test_with_source_relay_the_client_port_may_be_the_relay_port(nat: NatTable) -> None:
    flow = nat.open_tcp(at("C:40000"), K80, S80, Source.RELAY, 16000, 0)
    nat.attach(flow, at("K:40000"), 0)

    assert flow.rewrites[Step.T3].src == at("K:40000")


@pytest.mark.parametrize("source", list(Source))
def test_a_low_port_is_seen_by_the_server_as_a_low_one(nat: NatTable, source: Source) -> None:
    host = "C" if source is Source.CLIENT else "K"
    nat.mappings.reserved = frozenset({779})
    flows = []
    for number, (client, service) in enumerate(
        [("C:777", K80), ("C:777", at("G:80")), ("C:1023", K80), ("C:1024", K80), ("D:777", K80)]
    ):
        flow = nat.open_tcp(at(client), service, S80, source, 16000, 0)
        nat.attach(flow, at(f"K:{45000 + number}"), 0)
        flows.append(flow)
    seen = [flow.seen for flow in flows]

    assert seen[0] == at(f"{host}:777")
    assert seen[2] == at(f"{host}:1023")
    assert seen[3] == at(f"{host}:45003")
    low = [each for number, each in enumerate(seen) if number != 3]
    assert all(each is not None and each.port < 1024 for each in low)
    assert len(set(seen)) == 5
    assert all(flow.rewrites[Step.T4].old == flow_key(S80, flow.seen or K80) for flow in flows)


def test_a_low_port_stays_with_its_connection_and_is_given_back(nat: NatTable) -> None:
    flow = open_tcp(nat, "C:777")
    nat.attach(flow, at("K:45678"), 0)
    nat.attach(flow, at("K:45679"), 0)
    assert flow.seen == at("C:777")
    nat.close(flow, 0)
    other = open_tcp(nat, "C:777", 1)
    nat.attach(other, at("K:45680"), 1)
    assert other.seen is not None
    assert other.seen.port < 1024
    assert other.seen != at("C:777")  # late packets are still the former's
    nat.end(flow)
    nat.attach(other, at("K:45681"), 2)
    assert other.seen == at("C:777")


def test_a_clients_own_low_port_is_left_to_it(nat: NatTable) -> None:
    nat.saw_direct(Proto.TCP, at("C:777"), S80, 0)
    flow = open_tcp(nat, "C:777")
    nat.attach(flow, at("K:45678"), 0)
    assert flow.seen is not None
    assert (flow.seen.port < 1024, flow.seen == at("C:777")) == (True, False)

    held = open_tcp(nat, "C:779")
    nat.attach(held, at("K:45679"), 0)
    moved = nat.saw_direct(Proto.TCP, at("C:779"), S80, 0)
    assert moved is not None
    assert moved.src.port < 1024


def test_where_no_low_port_is_left_a_high_one_serves(nat: NatTable) -> None:
    for port in range(1, 1024):
        nat.saw_direct(Proto.TCP, at(f"C:{port}"), S80, 0)
    flow = open_tcp(nat, "C:777")
    nat.attach(flow, at("K:45678"), 0)

    assert flow.seen == at("C:45678")


def test_a_flow_is_found_as_tcp_relay_sees_it(nat: NatTable) -> None:
    first, second = open_tcp(nat), open_tcp(nat, port=443)

    assert nat.mappings.accepted(at("C:40000"), 16000) is first
    assert second.inside is not None
    assert nat.mappings.accepted(second.inside, 16000) is second
    assert nat.mappings.accepted(at("C:40000"), 17000) is None
    assert nat.mappings.accepted(at("D:40000"), 16000) is None


# Footprints


def test_footprints_are_counted_and_new_ones_are_told(nat: NatTable) -> None:
    told: list[dict[Footprint, int]] = []
    observe(nat, needs_rules=lambda: told.append(dict(nat.footprints)))
    tcp = Footprint(Proto.TCP, 80, 16000, S80.addr, False)
    udp = Footprint(Proto.UDP, 53, None, S53.addr, False)

    flows = [open_tcp(nat), open_tcp(nat, "D:1"), open_udp(nat)]

    assert told == [{tcp: 1}, {tcp: 2, udp: 1}]
    nat.end(flows[0])
    assert nat.footprints == {tcp: 1, udp: 1}
    nat.end(flows[1])
    nat.end(flows[2])
    assert nat.footprints == {}
    open_udp(nat)
    assert told[2:] == [{udp: 1}]


def test_any_client_is_part_of_a_footprint(nat: NatTable) -> None:
    flow = nat.open_forwarded(
        Proto.UDP, at("C:4000"), K53, S53, Source.RELAY, 0, relay_addr=K53.addr, any_client=True
    )

    assert flow.footprint == Footprint(Proto.UDP, 53, None, S53.addr, True)


# Flows


def test_flows_are_numbered_and_can_be_walked_while_they_end(nat: NatTable) -> None:
    flows = [open_udp(nat, f"C:{port}") for port in range(1, 6)]

    assert [flow.id for flow in flows] == [1, 2, 3, 4, 5]
    for flow in nat:
        nat.end(flow)
    assert len(nat) == 0
    assert open_udp(nat).id == 6


def test_the_unanswered_flows_are_the_udp_flows_without_an_answer(nat: NatTable) -> None:
    quiet, answered, _ = open_udp(nat), open_udp(nat, "D:1"), open_tcp(nat)
    answered.rewrites[Step.U34].packets = 1

    assert (quiet.state, answered.state) == (State.UNREPLIED, State.REPLIED)
    assert nat.unanswered() == [quiet]


@pytest.mark.parametrize("source", Source)
def test_the_two_sides_of_a_udp_flow_count_the_packets_of_two_hosts(source: Source) -> None:
    flow = open_udp(table(), source=source)
    client, server = flow.by(Side.CLIENT), flow.by(Side.SERVER)

    assert client is not None
    assert server is not None
    assert client.old == flow_key(at("C:4000"), K53)
    assert server.old[:4] == S53.addr
    assert {SIDES[client.step], SIDES[server.step]} == {Side.CLIENT, Side.SERVER}


def test_steps_are_labelled_as_the_design_names_them() -> None:
    assert [step.label for step in Step] == [
        "T1", "T2", "T3", "T4", "U1", "U2", "U3", "U4", "U1,U2", "U3,U4", "D1", "D2",
    ]  # fmt: skip


@pytest.mark.slow
def test_60000_flows_of_source_relay_have_a_port_each_and_beyond_all_ports_it_is_refused() -> None:
    nat = NatTable(FlowLimits(100_000, 100_000), rng=Random(5))
    rng = Random(6)
    ports: Counter[int] = Counter()
    kept = 0
    for number in range(64_512):
        client = Endpoint((10 << 24 | number).to_bytes(4), rng.randrange(1024, 0x10000))
        service, server = (K53, S53) if number % 2 else (at("K:123"), at("S:123"))
        flow = nat.open_forwarded(
            Proto.UDP, client, service, server, Source.RELAY, 0, relay_addr=K53.addr
        )
        assert flow.relay
        flow.spoke_again = True
        ports[flow.relay.port] += 1
        kept += flow.relay.port % 2 == client.port % 2
        if number == 60_000:
            assert kept > 0.97 * number

    assert (len(ports), max(ports.values())) == (64_512, 1)
    with pytest.raises(Refusal, match="no_port"):
        nat.open_forwarded(Proto.UDP, at("C:5000"), K53, S53, Source.RELAY, 0, relay_addr=K53.addr)
    nat.end(next(iter(nat)))
    assert nat.open_forwarded(
        Proto.UDP, at("C:5000"), K53, S53, Source.RELAY, 0, relay_addr=K53.addr
    ).relay


@pytest.mark.parametrize("proto", Proto)
def test_no_flow_gets_a_port_that_the_host_has_reserved(proto: Proto) -> None:
    nat = NatTable(rng=Random(1))
    nat.mappings.reserved = frozenset(range(4000, 65536)) | frozenset(range(1024))

    def relay_port(port: int) -> int:
        client = at(f"C:{port}")
        flow = nat.open_forwarded(proto, client, K53, S53, Source.RELAY, 0, relay_addr=K53.addr)
        assert flow.relay is not None
        return flow.relay.port

    assert relay_port(2000) == 2000
    got = [relay_port(port) for port in range(5000, 5050)]
    assert len(set(got)) == 50
    assert all(1024 <= port < 4000 for port in got)
    nat.mappings.reserved = frozenset(range(65536))
    with pytest.raises(Refusal, match="no_port"):
        relay_port(3000)


# Servers that answer from another port

both_ways = pytest.mark.parametrize(
    ("source", "seen"), [(Source.CLIENT, "C:6900"), (Source.RELAY, "K:6900")]
)


@both_ways
def test_an_answer_from_another_port_is_the_askers(source: Source, seen: str) -> None:
    nat = table()
    asked = open_tftp(nat, source=source)
    flow = nat.answered_elsewhere(at("S:7000"), at(seen), 1)

    assert flow is not None
    assert (flow.client, flow.service, flow.server) == (asked.client, at("K:7000"), at("S:7000"))
    assert (flow.source, flow.relay, flow.footprint) == (source, asked.relay, asked.footprint)
    assert nat.answered_elsewhere(at("S:7000"), at(seen), 1) is None  # it has its flow
    assert nat.answered_elsewhere(at("S:7001"), at(seen), 1) is not None


@both_ways
def test_nobody_who_has_not_asked_is_answered_from_another_port(source: Source, seen: str) -> None:
    nat = table()
    asked = open_tftp(nat, source=source)
    for server, client in (
        ("S:7000", "C:6901"), ("S:7000", "K:6901"), ("D:7000", seen), ("S:69", seen), ("S:0", seen),
    ):  # fmt: skip
        assert nat.answered_elsewhere(at(server), at(client), 1) is None
    open_udp(nat, "C:4000")
    assert nat.answered_elsewhere(at("S:7000"), at("C:4000"), 1) is None
    nat.end(asked)
    assert nat.answered_elsewhere(at("S:7000"), at(seen), 1) is None


def test_a_port_of_the_relays_stays_taken_until_all_answers_are_over() -> None:
    nat = table()
    asked = open_tftp(nat, source=Source.RELAY)
    flow = nat.answered_elsewhere(at("S:7000"), at("K:6900"), 1)
    assert flow is not None

    nat.end(asked)
    assert open_tftp(nat, "D:6900", Source.RELAY).relay != at("K:6900")
    nat.end(flow)
    assert open_tftp(nat, "Z:6900", Source.RELAY).relay == at("K:6900")


def test_of_two_queries_from_one_port_the_later_is_answered() -> None:
    nat = table()
    open_tftp(nat)
    later = open_tftp(nat, service="K:70")
    flow = nat.answered_elsewhere(at("S:7000"), at("C:6900"), 1)
    assert flow is not None
    nat.end(flow)
    nat.end(later)
    assert nat.answered_elsewhere(at("S:7000"), at("C:6900"), 1) is None


def test_answers_from_other_ports_keep_to_the_limits_of_the_client() -> None:
    nat = table(flows_per_client=2)
    confirm(open_tftp(nat))
    first = nat.answered_elsewhere(at("S:7000"), at("C:6900"), 1)
    assert first is not None
    confirm(first)
    nat.admission.confirmed(first)
    nat.admission.confirmed(next(iter(nat)))
    with pytest.raises(Refusal, match="client_full"):
        nat.answered_elsewhere(at("S:7001"), at("C:6900"), 1)


@pytest.mark.parametrize("source", list(Source))
def test_a_service_that_is_answered_from_elsewhere_in_vain_is_found(source: Source) -> None:
    nat = table()
    flow = open_udp(nat, source=source)
    seen = flow.relay or flow.client
    assert nat.asked_elsewhere(at("S:7000"), seen) == K53
    assert nat.asked_elsewhere(at("S:53"), seen) is None
    assert nat.asked_elsewhere(at("D:7000"), seen) is None
    assert nat.asked_elsewhere(at("S:7000"), seen._replace(port=4001)) is None
    answers = flow.by(Side.SERVER)
    assert answers is not None
    answers.packets = 1  # it answers from where it was asked, too
    assert nat.asked_elsewhere(at("S:7000"), seen) is None


def test_a_low_port_of_the_relay_is_no_services(nat: NatTable) -> None:
    """Else what the server says when the flow has gone would be a client's."""
    flow = nat.open_tcp(at("C:443"), K80, S80, Source.RELAY, 16000, 0)
    nat.attach(flow, at("K:45678"), 0, services=frozenset(range(1, 1022)))
    assert flow.seen == at("K:1023")
