"""Flows that krelay ends by itself: which, by whom, and whose ends are probed."""

from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Network
from random import Random
from typing import cast

import pytest

from knet.endpoint import Proto, Source
from knet.rawsocket import RawSender
from krelay.daemon import flowends
from krelay.daemon.flowends import (
    ASK_AGAIN,
    ASKED_FOR,
    PROBE_AFTER,
    PROBED_AT_ONCE,
    FlowEnder,
)
from krelay.datapath.probes import abort_probes, liveness_probes
from krelay.host.hostview import HostView
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.offload.service import Offload
from krelay.registration.registry import Relays
from krelay.steps import Side
from tests.tools.packets import addr, at, policy
from tests.tools.stepped import SteppedLoop

VIEW = HostView(policy().own, policy().beside, addr("K"), True)


class Rig:
    """A table, and what is done about its flows, in order."""

    def __init__(self, loop: SteppedLoop) -> None:
        self.loop = loop
        self.nat = NatTable(rng=Random(1))
        self.done: list[object] = []
        """Packets that were sent, `withdrawn`, and flows that tcp-relay was to abort."""
        self.ender = FlowEnder(
            loop, self.nat, cast(Relays, self), cast(Offload, self), cast(RawSender, self)
        )

    def send(self, packet: bytes) -> None:
        self.done.append(packet)

    def withdraw_now(self) -> None:
        self.done.append("withdrawn")

    def abort(self, flow: Flow, now: float) -> None:
        assert now == self.loop.now
        self.done.append(flow)
        flow.abort_asked = True

    def terminated(self, client: str = "C:40000", gport: int = 16000) -> Flow:
        """A connection that tcp-relay has accepted."""
        flow = self.nat.open_tcp(
            at(client), at("K:80"), at("S:80"), Source.CLIENT, gport, self.loop.now
        )
        flow.accepted = True
        return flow

    def forwarded(self, client: str = "C:40000", *, is_open: bool = True) -> Flow:
        flow = self.nat.open_forwarded(
            Proto.TCP, at(client), at("K:443"), at("S:443"), Source.CLIENT, self.loop.now
        )
        if is_open:
            flow.tracker.resumed()
        return flow

    def datagrams(
        self,
        client: str = "C:4000",
        server: str = "S:5000",
        source: Source = Source.CLIENT,
        relay: str = "K",
    ) -> Flow:
        return self.nat.open_forwarded(
            Proto.UDP,
            at(client),
            at("K:5000"),
            at(server),
            source,
            self.loop.now,
            relay_addr=addr(relay),
        )

    def alive(self, *flows: Flow) -> list[bool]:
        return [self.nat.of_id(flow.id) is flow for flow in flows]


@pytest.fixture
def rig() -> Iterator[Rig]:
    with SteppedLoop() as loop:
        yield Rig(loop)


# One flow, or all


def test_tcp_relay_ends_what_it_terminates(rig: Rig) -> None:
    flow = rig.terminated()
    rig.ender.end(flow)
    assert rig.done == [flow]


def test_a_forwarded_flow_is_withdrawn_before_its_ends_are_asked(rig: Rig) -> None:
    flow = rig.forwarded()
    probes = abort_probes(flow)

    rig.ender.end(flow)

    assert rig.done == ["withdrawn", *probes]
    assert len(probes) == 2
    assert flow.abort_asked
    assert rig.alive(flow) == [True], "until both ends are told"


def test_an_end_that_says_nothing_is_asked_again(rig: Rig) -> None:
    flow, other = rig.forwarded("C:1"), rig.forwarded("C:2")
    to_client, to_server = abort_probes(flow)
    of_other = abort_probes(other)
    rig.ender.end(flow)
    rig.ender.end(other)
    rig.ender.end(other)
    rig.done.clear()

    rig.loop.advance(ASK_AGAIN)
    assert rig.done == [to_client, to_server, *of_other]
    rig.done.clear()

    flow.told |= {Side.CLIENT}
    rig.nat.close(other, rig.loop.now)
    rig.loop.advance(ASK_AGAIN)
    assert rig.done == [to_server], "not who was told"
    rig.loop.advance(ASKED_FOR - 2 * ASK_AGAIN)
    assert rig.done == [to_server] * 4
    rig.loop.advance(60)
    assert rig.done == [to_server] * 4


def test_the_ends_of_one_killed_later_are_asked_as_long(rig: Rig) -> None:
    flow, later = rig.forwarded("C:1"), rig.forwarded("C:2")
    rig.ender.end(flow)
    rig.loop.advance(ASKED_FOR + 60)
    rig.done.clear()

    rig.ender.end(later)
    rig.loop.advance(60)

    asked = int(ASKED_FOR / ASK_AGAIN)
    assert rig.done == ["withdrawn", *abort_probes(later) * (1 + asked)]


def test_datagrams_end_at_once(rig: Rig) -> None:
    flow = rig.datagrams()
    rig.ender.end(flow)
    assert (rig.alive(flow), rig.done) == ([False], [])


def test_the_end_of_relaying_lasts_until_connections_are_reset(rig: Rig) -> None:
    terminated, forwarded, datagrams = rig.terminated(), rig.forwarded("C:2"), rig.datagrams()
    closed = rig.terminated("C:3")
    rig.nat.close(closed, rig.loop.now)

    rig.ender.end_all()

    assert rig.done == [terminated, "withdrawn", *abort_probes(forwarded)]
    assert rig.alive(datagrams) == [True]
    assert rig.ender.is_ending
    rig.nat.close(terminated, rig.loop.now)
    assert rig.ender.is_ending
    rig.nat.close(forwarded, rig.loop.now)
    assert not rig.ender.is_ending


def test_of_many_forwarded_flows_the_newest_are_told(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flowends, "MOST_TOLD", 2)
    flows = [rig.forwarded(f"C:{port}") for port in (1, 2, 3)]

    rig.ender.end_all()

    assert [flow.abort_asked for flow in flows] == [False, True, True]


# What the host's changes have made useless


def test_unanswered_flows_to_a_former_server_end(rig: Rig) -> None:
    former, answered = rig.datagrams("C:1", "Z:5000"), rig.datagrams("C:2", "Z:5000")
    present = rig.datagrams("C:3")
    answered.rewrites[list(answered.rewrites)[-1]].packets = 1

    rig.ender.end_unanswered(addr("S"))

    assert rig.alive(former, answered, present) == [False, True, True]


def test_connections_led_to_a_port_without_tcp_relay_end(rig: Rig) -> None:
    led, accepted = rig.terminated("C:1", 16000), rig.terminated("C:2", 16000)
    served, forwarded = rig.terminated("C:3", 17000), rig.forwarded("C:4")
    led.accepted = served.accepted = False

    rig.ender.end_unserved(frozenset({17000}))

    assert rig.alive(led, accepted, served, forwarded) == [False, True, True, True]


def test_unanswered_flows_whose_source_would_be_another_end(rig: Rig) -> None:
    same, other = rig.datagrams("C:1"), rig.datagrams("D:1")
    before = (VIEW, policy())
    beside = policy(beside=(IPv4Network("192.168.0.0/24"), IPv4Network(f"{at('D:1').host}/32")))

    rig.ender.end_stale(before, (VIEW, beside))

    assert rig.alive(same, other) == [True, False]


def test_flows_from_an_address_that_is_gone_end(rig: Rig) -> None:
    gone = rig.datagrams("C:1", source=Source.RELAY)
    answered = rig.datagrams("C:2", source=Source.RELAY)
    answered.rewrites[list(answered.rewrites)[-1]].packets = 1
    own, tcp = rig.datagrams("C:3"), rig.terminated("C:4")
    other = rig.datagrams("C:5", source=Source.RELAY, relay="G")
    view = VIEW._replace(own=VIEW.own - {addr("K")})
    now = replace(policy(), own=view.own)

    rig.ender.end_stale((VIEW, policy()), (view, now))

    assert rig.alive(gone, answered, own, tcp, other) == [False, False, True, True, True]


# Ends that perhaps wait for ever


def test_ends_of_open_connections_are_probed_twice(rig: Rig) -> None:
    terminated, forwarded = rig.terminated("C:1"), rig.forwarded("C:2")
    rig.forwarded("C:3", is_open=False)
    rig.terminated("C:4").accepted = False
    rig.datagrams()

    rig.ender.probe_ends()
    assert rig.done == [], "not before packets have their turn"

    probes = [*liveness_probes(terminated), *liveness_probes(forwarded)]
    assert PROBE_AFTER == (0, 1)
    for after in PROBE_AFTER:
        rig.loop.advance(after)
        assert rig.done == probes
        rig.done.clear()
    rig.loop.advance(60)
    assert rig.done == []


def test_many_connections_are_probed_by_and_by(rig: Rig) -> None:
    flows = [rig.forwarded(f"C:{1 + n}") for n in range(2 * PROBED_AT_ONCE + 1)]
    rig.ender.probe_ends()

    seen = []
    rig.loop.advance(0)
    while rig.done:
        seen.append(len(rig.done))
        rig.done.clear()
        rig.loop.advance(0.006)

    assert seen == [2 * PROBED_AT_ONCE, 2 * PROBED_AT_ONCE, 2]
    assert sum(seen) == 2 * len(flows)


def test_a_flow_that_has_ended_is_not_probed(rig: Rig) -> None:
    ended, alive = rig.forwarded("C:1"), rig.forwarded("C:2")
    rig.ender.probe_ends()
    rig.nat.end(ended)

    rig.loop.advance(0)

    assert rig.done == liveness_probes(alive)


def test_nothing_is_probed_when_relaying_has_ended(rig: Rig) -> None:
    rig.terminated()
    rig.ender.probe_ends()
    rig.ender.end_all()
    rig.done.clear()

    rig.loop.advance(60)

    assert rig.done == []
