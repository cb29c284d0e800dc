"""Queries that begin flows by themselves: which may, and that nobody can tell."""

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from knet.endpoint import Proto, Source, flow_key
from krelay.datapath.policy import Policy
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.offload.learning import Learning, ends_of, learning_for, released_by
from krelay.registration.messages import Close, Open, Opened
from procfs_sim.tree import Config, parse
from tests.krelay.offload.test_policy import Twins
from tests.tools.kernel import Datapath
from tests.tools.packets import addr, at, policy

SERVES = policy(udp=frozenset({53, 123}))


def config(**more: object) -> Config:
    values = {"services": parse("services", "udp/53"), "real_ip": IPv4Address(addr("S")), **more}
    return Config(**values)


def learnt(
    given: Policy = SERVES, *, traced: frozenset[bytes] | None = frozenset(), **more: object
) -> Learning | None:
    return learning_for(config(**more), given, traced)


def test_clients_may_ask_any_address_of_this_host_but_loopback() -> None:
    own = frozenset({addr("K"), addr("G"), bytes((127, 0, 0, 1))})
    learning = learnt(replace(SERVES, own=own))
    assert learning is not None
    assert {each.packed for each in learning.addresses} == {addr("K"), addr("G")}
    assert learning.server == IPv4Address(addr("S"))


def test_not_those_about_whom_the_worker_decides() -> None:
    beside = IPv4Network("10.9.0.0/16")
    learning = learnt(replace(SERVES, beside=(beside,)), traced=frozenset({addr("D")}))
    assert learning is not None
    for each in (addr("K"), addr("S"), addr("D"), bytes((10, 9, 1, 1)), bytes((127, 0, 0, 9))):
        assert any(IPv4Address(each) in net for net in learning.strangers), each
    assert not any(IPv4Address(addr("C")) in net for net in learning.strangers)


@pytest.mark.parametrize(
    ("given", "more"),
    [
        (replace(SERVES, source=Source.RELAY), {}),
        (replace(SERVES, udp=frozenset({123})), {}),
        (replace(SERVES, any_port=frozenset({53})), {}),
        (SERVES, {"limits_new_flows_per_client": 5}),
        (SERVES, {"traced": None}),
        (replace(SERVES, own=frozenset()), {}),
    ],
    ids=["source", "no service", "any port", "rate", "all are traced", "no network"],
)
def test_where_there_is_more_to_decide_none_may(given: Policy, more: dict[str, object]) -> None:
    assert learnt() is not None
    assert learnt(given, **more) is None  # type: ignore[arg-type]


# Ends with flows of their own


def open_udp(nat: NatTable, service: str, port: int = 53) -> Flow:
    return nat.open_forwarded(
        Proto.UDP, at("C:4000"), at(f"{service}:{port}"), at(f"S:{port}"), Source.CLIENT, 1.0
    )


def test_a_flows_ends_are_its_clients_and_what_the_server_knows() -> None:
    nat = NatTable(rng=Random(1))
    first, moved = open_udp(nat, "K"), open_udp(nat, "G")
    assert ends_of(first) == {at("C:4000")}
    (other,) = ends_of(moved) - {at("C:4000")}
    assert other.addr == addr("C")


def test_an_end_is_released_with_the_last_that_has_it() -> None:
    nat = NatTable(rng=Random(1))
    nat.dns_flows.learns(frozenset({addr("K"), addr("G")}), addr("S"))
    first, moved = open_udp(nat, "K"), open_udp(nat, "G")
    assert at("C:4000") not in released_by(first, nat)
    assert released_by(moved, nat) == ends_of(moved) - {at("C:4000")}
    nat.end(first)
    assert released_by(moved, nat) == ends_of(moved)
    nat.direct.saw(Proto.UDP, flow_key(at("C:4000"), at("S:53")), 1.0)
    assert at("C:4000") not in released_by(moved, nat), "it talks to the server itself"
    assert released_by(open_udp(nat, "K", 123), nat) == set(), "no flow of queries"


# All together


class LearningTwins(Twins):
    """The same traffic, with queries that begin flows in the kernel and without.

    What is documented to be otherwise doesn't happen: a query is over with its answer, so that the
    next from its port may go to another server, or come from another address of the relay.
    """

    asked = "K"

    def __init__(self, seed: int) -> None:
        super().__init__(seed, lazy=True)
        self.fast = Datapath(self.slow.policy, 1000, FlowLimits(), seed, learns=True)
        self.both = (self.slow, self.fast)
        self.fast.nat.timeouts = self.timeouts

    def agree(self) -> None:
        self.fast.count(self.fast.nat.workers)
        self.fast.hear_queries()
        assert self.slow.steps() == self.fast.steps()

    def one(self, wanted: object) -> Iterable[tuple[Datapath, Flow]]:
        """A flow of either, and its twin: numbers differ, since what is learnt has one later."""

        def like(flow: Flow) -> tuple[object, ...]:
            return flow.client, flow.service, flow.proto, flow.relay, flow.gport and flow.created_at

        flows = [f for f in self.slow.nat if wanted(f)]  # type: ignore[operator]
        if not flows:
            return
        its = like(self.rng.choice(flows))
        self.fast.hear_queries()
        for each in self.both:
            yield each, next(flow for flow in each.nat if like(flow) == its)
            each.refresh()

    def ask(self, request: Open | Close) -> None:
        answers = [each.relays.handle(request, each.tcp_relay, each.now) for each in self.both]
        one, other = (replace(a, id=0) if isinstance(a, Opened) else a for a in answers)
        assert one == other
        for each in self.both:
            each.refresh()

    def setting(self) -> None:
        new = replace(self.slow.policy, source=self.rng.choice(list(Source)))
        for each in self.both:
            each.set(new)

    def look(self) -> None:
        self.fast.hear_queries()

    def pass_time(self, steps: int) -> None:
        self.fast.hear_queries()  # within milliseconds
        super().pass_time(steps)


@given(st.integers(0, 2**32))
@example(15)  # a flow ends while another one has its client's end
@example(31)  # the fourth query is heard of in the midst of a decision
def test_nobody_can_tell_whether_a_query_began_its_flow_by_itself(seed: int) -> None:
    LearningTwins(seed).run(120)


def test_many_queries_begin_by_themselves_while_nobody_can_tell() -> None:
    learnt = 0
    for seed in range(8):
        twins = LearningTwins(seed)
        twins.run(200)
        learnt += twins.fast.kernel.queries_told
    assert learnt > 20
