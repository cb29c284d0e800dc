"""The answers to tcp-relay: whose connection is which, after every way to lose one another."""

import math
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from knet.endpoint import Endpoint, Source
from krelay.datapath.policy import Policy
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import CLOSED_LINGER, Flow
from krelay.nat.table import NatTable
from krelay.nat.tcpstate import State
from krelay.registration.inforce import InForce
from krelay.registration.messages import (
    COUNTERS,
    GAUGES,
    MAX_COUNTS,
    PORT_TAKEN,
    Abort,
    Answer,
    Close,
    Open,
    Opened,
    Refused,
    Report,
    Resume,
    Resumed,
)
from krelay.registration.registry import ABORT_WITHIN, GONE_KEPT, GPORTS_KEPT, ORPHAN_GRACE, Relays
from krelay.steps import Step
from tests.tools.observing import observe
from tests.tools.packets import addr, at, policy
from tests.tools.sockets import OneUser

C, K, S, Y = at("C:40000"), at("K:80"), at("S:80"), at("K:45678")
USER = 990
OPEN = Open(1, C, 16000, Y)
RESUME = Resume(2, C, 16000, Y, S)


@dataclass(eq=False)
class TcpRelay:
    """One connection of the relay socket: who it is, and what it was told unasked."""

    said: list[Answer] = field(default_factory=list)

    def __call__(self, answer: Answer) -> None:
        self.said.append(answer)


class World:
    """A table and the tcp-relays connected to it, two of one user."""

    def __init__(self, limits: FlowLimits | None = None) -> None:
        self.nat = NatTable(limits, rng=Random(1))
        self.policy: Policy | None = policy()
        self.kernel = OneUser(USER)
        self.relays = Relays(self.nat, lambda: self.policy, self.kernel)
        self.relays.resumable_until = math.inf
        self.relays.remember(InForce(16000, S.addr, Source.CLIENT, frozenset({80, 443})))
        self.one, self.two = self.joined(), self.joined()

    def joined(self, uid: int = USER) -> "TcpRelay":
        tcp_relay = TcpRelay()
        self.relays.joined(tcp_relay, uid)
        self.relays.listens(tcp_relay, 16000)
        return tcp_relay

    def client(self, client: Endpoint = C, service: Endpoint = K, now: float = 0) -> Flow:
        """A flow whose client has completed its handshake."""
        server = Endpoint(S.addr, service.port)
        flow = self.nat.open_tcp(client, service, server, Source.CLIENT, 16000, now)
        flow.tracker.client_acked = True
        return flow

    def connected(self) -> Flow:
        flow = self.client()
        assert self.relays.handle(OPEN, self.one, 0) == Opened(1, S, Source.CLIENT)
        flow.tracker.resumed()
        return flow


@pytest.fixture
def world() -> World:
    return World()


# open


def test_a_clients_flow_is_opened_with_its_server_and_source(world: World) -> None:
    flow = world.client()

    assert world.relays.handle(OPEN, world.one, 0) == Opened(1, S, Source.CLIENT)
    assert flow.relay == Y
    assert set(flow.rewrites) == {Step.T1, Step.T2, Step.T3, Step.T4}


@pytest.mark.parametrize(
    "request_",
    [
        OPEN,
        Open(1, at("D:40000"), 16000, Y),
        Open(1, C, 17000, Y),
        Open(1, at("C:40001"), 16000, Y),
    ],
)
def test_without_a_flow_nobody_is_served(world: World, request_: Open) -> None:
    world.relays.listens(world.one, 17000)
    if request_ != OPEN:
        world.client()

    assert world.relays.handle(request_, world.one, 0) == Refused(1, "no row for this client")
    assert world.nat.mappings.of_relay_port(Y) is None


def test_where_the_inside_port_differs_the_answer_tells_the_clients_own(world: World) -> None:
    world.client()
    second = world.client(service=at("K:443"))
    assert second.inside not in (None, C)
    assert second.inside is not None

    answer = world.relays.handle(Open(7, second.inside, 16000, Y), world.one, 0)

    assert answer == Opened(7, at("S:443"), Source.CLIENT, origin=C)


def test_a_taken_relay_port_is_refused_by_the_word_that_means_try_another(world: World) -> None:
    world.client()
    assert world.relays.handle(Open(1, C, 16000, at("K:40000")), world.one, 0) == Refused(
        1, PORT_TAKEN
    )
    assert world.relays.handle(OPEN, world.one, 0) == Opened(1, S, Source.CLIENT)


def test_an_ended_flow_is_refused_and_closed(world: World) -> None:
    flow = world.client()
    flow.tracker.client_acked = True
    world.relays.abort(flow, 0)

    assert world.relays.handle(OPEN, world.one, 1) == Refused(1, "the flow was ended")
    assert flow.state is State.CLOSED
    assert world.relays.handle(OPEN, world.one, 2) == Refused(1, "the flow was ended")
    assert flow.closed_at == 1


# close


def test_close_closes_the_flow_which_goes_when_the_last_packets_are_through(world: World) -> None:
    flow = world.connected()

    assert world.relays.handle(Close(Y), world.one, 5) is None
    assert flow.state is State.CLOSED
    assert world.nat.expire(5 + CLOSED_LINGER + 1) == [flow]


def test_close_of_what_is_not_there_does_nothing(world: World) -> None:
    assert world.relays.handle(Close(Y), world.one, 0) is None
    assert len(world.nat) == 0


def test_a_closed_flow_is_not_closed_again_when_its_tcp_relay_is_lost(world: World) -> None:
    flow = world.connected()
    world.relays.handle(Close(Y), world.one, 1)
    world.relays.lost(world.one, 2)
    world.relays.on_time(100)

    assert flow.closed_at == 1


# resume


def test_after_krelay_was_gone_a_flow_is_made_again_established(world: World) -> None:
    assert world.relays.handle(RESUME, world.one, 0) == Resumed(2)

    [flow] = world.nat
    assert (flow.client, flow.inside, flow.service, flow.server, flow.relay) == (C, C, K, S, Y)
    assert (flow.gport, flow.source, flow.state) == (16000, Source.CLIENT, State.ESTABLISHED)
    assert set(flow.rewrites) == {Step.T1, Step.T2, Step.T3, Step.T4}
    assert not any(rewrite.watched for rewrite in flow.rewrites.values())
    assert world.nat.expire(7000) == []


def test_a_flow_made_again_is_the_flow_that_was(world: World) -> None:
    before = world.connected()
    keys = {step: (r.old, r.new) for step, r in before.rewrites.items()}
    reborn = World()

    reborn.relays.handle(RESUME, reborn.one, 0)

    [flow] = reborn.nat
    assert {step: (r.old, r.new) for step, r in flow.rewrites.items()} == keys
    assert flow.footprint == before.footprint


def test_what_tcp_relay_remembers_beyond_the_contract_is_believed(world: World) -> None:
    inside = at("C:41234")
    request = Resume(
        3, inside, 16000, Y, at("S:443"),
        service=at("G:443"), source=Source.RELAY, origin=C,
    )  # fmt: skip

    assert world.relays.handle(request, world.one, 0) == Resumed(3)

    [flow] = world.nat
    assert (flow.client, flow.inside, flow.service) == (C, inside, at("G:443"))
    assert flow.rewrites[Step.T3].src == Y


def test_without_a_source_the_clients_place_decides(world: World) -> None:
    neighbour = Resume(2, at("N:40000"), 16000, Y, S)

    world.relays.handle(neighbour, world.one, 0)

    assert [flow.source for flow in world.nat] == [Source.RELAY]


def test_after_only_the_socket_was_lost_the_flow_stays_and_has_a_new_owner(world: World) -> None:
    flow = world.connected()
    world.relays.lost(world.one, 1)

    assert world.relays.handle(RESUME, world.two, 2) == Resumed(2)
    world.relays.on_time(100)
    assert list(world.nat) == [flow]
    assert flow.closed_at is None
    world.relays.abort(flow, 101)
    assert (world.one.said, world.two.said) == ([], [Abort(Y)])


@pytest.mark.parametrize(
    ("limits", "reason"),
    [(FlowLimits(flows=0), "table_full"), (FlowLimits(flows_per_client=0), "client_full")],
)
def test_what_has_no_room_cannot_be_resumed(limits: FlowLimits, reason: str) -> None:
    world = World(limits)

    answer = world.relays.handle(RESUME, world.one, 0)

    assert answer == Refused(2, f"can't be resumed: {reason}")
    assert len(world.nat) == 0


def test_what_another_uses_cannot_be_resumed_and_leaves_no_flow(world: World) -> None:
    flow = world.connected()

    answer = world.relays.handle(Resume(2, at("C:40001"), 16000, Y, S), world.two, 1)

    assert answer == Refused(2, "can't be resumed: port_taken")
    assert list(world.nat) == [flow]
    assert world.nat.mappings.of_relay_port(Y) is flow


def test_a_closed_flow_is_no_obstacle_to_who_resumes_between_its_ports(world: World) -> None:
    flow = world.connected()
    world.relays.handle(Close(Y), world.one, 1)

    assert world.relays.handle(RESUME, world.one, 2) == Resumed(2)

    again = world.nat.mappings.of_relay_port(Y)
    assert again is not None
    assert again is not flow
    assert world.nat.mappings.accepted(C, 16000) is again


def test_a_refused_resume_takes_nothing_from_the_flow_that_lives(world: World) -> None:
    """The same client ports from another relay port: the live flow keeps its packets."""
    flow = world.connected()
    found = [(rewrite.table, rewrite.old) for rewrite in flow.rewrites.values()]

    answer = world.relays.handle(Resume(2, C, 16000, at("K:40000"), S), world.two, 1)

    assert isinstance(answer, Refused)
    assert world.nat.mappings.accepted(C, 16000) is flow
    assert all(table[at_].flow is flow for table, at_ in found)


# what is bounded


STRANGER = 65534


def test_a_client_whose_handshake_was_not_seen_is_nobodys(world: World) -> None:
    """Its address may be forged."""
    flow = world.client()
    flow.tracker.client_acked = False

    assert world.relays.handle(OPEN, world.one, 0) == Refused(1, "no row for this client")
    assert not flow.accepted


@pytest.mark.parametrize("whose", [None, STRANGER])
def test_a_client_whose_connection_another_has_or_nobody_is_nobodys(
    world: World, whose: int | None
) -> None:
    flow = world.client()
    flow.tracker.client_acked = False
    world.kernel.others[at("K:16000"), C] = whose
    world.relays.expect([OPEN], world.one)
    assert world.relays.handle(OPEN, world.one, 0) == Refused(1, "no row for this client")

    del world.kernel.others[at("K:16000"), C]
    world.relays.expect([OPEN], world.one)
    assert world.relays.handle(OPEN, world.one, 0) == Opened(1, S, Source.CLIENT)


def test_a_handshake_that_the_kernel_rewrote_is_heard_of_when_it_matters(world: World) -> None:
    flow = world.client()
    flow.tracker.client_acked = False
    observe(
        world.nat,
        before_expiry=lambda flows: world.nat.tracking.heard(flows[0].rewrites[Step.T1], 1, 40, 0),
    )

    assert world.relays.handle(OPEN, world.one, 0) == Opened(1, S, Source.CLIENT)


def test_who_has_handed_over_no_socket_gets_nobodys_client(world: World) -> None:
    nobody = TcpRelay()
    world.client()
    words = "the listening socket was not handed over"
    assert world.relays.handle(OPEN, nobody, 0) == Refused(1, words)
    world.relays.joined(nobody, USER)
    assert world.relays.handle(OPEN, nobody, 0) == Refused(1, words)
    world.relays.listens(nobody, 17000)

    assert world.relays.handle(OPEN, nobody, 0) == Refused(1, words)


def test_a_client_that_one_tcp_relay_has_is_not_anothers(world: World) -> None:
    flow = world.connected()
    again = replace(OPEN, relay=at("K:45000"))

    answer = world.relays.handle(again, world.two, 1)
    assert answer == Refused(1, "another tcp-relay has this client")
    assert flow.relay == Y
    stranger = world.joined(STRANGER)
    world.relays.lost(world.one, 2)
    assert isinstance(world.relays.handle(again, stranger, 3), Refused)

    assert world.relays.handle(again, world.two, 3) == Opened(1, S, Source.CLIENT)


def test_a_relay_port_that_another_flow_has_is_taken_also_for_another_client(world: World) -> None:
    """Its packets to the server would be the other's."""
    flow = world.connected()
    world.client(at("D:40000"))

    answer = world.relays.handle(Open(5, at("D:40000"), 16000, Y), world.two, 1)

    assert answer == Refused(5, PORT_TAKEN)
    assert world.nat.mappings.of_relay_port(Y) is flow
    assert all(rewrite.table[rewrite.old] is rewrite for rewrite in flow.rewrites.values())


@pytest.mark.parametrize("relay", [at("S:45678"), at("D:45678"), Endpoint.of("127.0.0.1", 45678)])
def test_a_relay_port_is_one_of_this_hosts(world: World, relay: Endpoint) -> None:
    world.client()
    answer = world.relays.handle(replace(OPEN, relay=relay), world.one, 0)

    assert answer == Refused(1, "relay is no address of this host")


def test_a_flow_is_closed_by_its_own_tcp_relay_alone(world: World) -> None:
    flow = world.connected()
    for other in (world.two, world.joined(STRANGER), TcpRelay()):
        answer = world.relays.handle(Close(Y), other, 1)
        assert answer == Refused(None, "that flow is not this tcp-relay's")

    assert flow.closed_at is None


NEVER = "can't be resumed: this was never in force"
NO_CLIENT = "can't be resumed: this is no client"
NOT_SEEN = "can't be resumed: the server can't see the client so"
NOT_OURS = "can't be resumed: service and relay are addresses of this host"


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (replace(RESUME, server=at("S:81")), NEVER),
        (replace(RESUME, server=at("S:22")), NEVER),
        (replace(RESUME, server=at("N:80")), NEVER),
        (replace(RESUME, server=at("S:443"), service=K), NEVER),
        (replace(RESUME, service=at("K:22")), NEVER),
        (replace(RESUME, gport=17999), NEVER),
        (replace(RESUME, service=at("D:80")), NOT_OURS),
        (replace(RESUME, relay=at("D:45678")), NOT_OURS),
        (replace(RESUME, client=at("K:40000")), NO_CLIENT),
        (replace(RESUME, client=Endpoint.of("127.0.0.1", 4)), NO_CLIENT),
        (replace(RESUME, client=Endpoint.of("224.0.0.1", 4)), NO_CLIENT),
        (replace(RESUME, client=Endpoint.of("0.0.0.0", 4)), NO_CLIENT),
        (replace(RESUME, origin=at("D:40000")), NO_CLIENT),
        (replace(RESUME, seen=at("C:777")), NOT_SEEN),
        (replace(RESUME, client=at("C:777"), seen=at("D:777")), NOT_SEEN),
        (replace(RESUME, client=at("C:777"), seen=at("K:777")), NOT_SEEN),
        (replace(RESUME, client=at("C:777"), seen=at("C:1024")), NOT_SEEN),
        (replace(RESUME, client=at("C:777"), seen=at("C:45679")), NOT_SEEN),
    ],
)
def test_what_never_can_have_been_is_not_resumed(
    world: World, request_: Resume, error: str
) -> None:
    assert world.relays.handle(request_, world.one, 0) == Refused(2, error)
    assert len(world.nat) == 0


def test_the_port_that_the_server_sees_is_resumed_with_its_connection(world: World) -> None:
    low = replace(RESUME, client=at("C:777"), seen=at("C:778"))
    assert world.relays.handle(low, world.one, 0) == Resumed(2)
    flow = world.nat.mappings.of_relay_port(Y)
    assert flow is not None
    assert flow.seen == at("C:778")

    other = replace(RESUME, client=at("C:779"), relay=at("K:45679"), seen=at("C:778"))
    assert isinstance(world.relays.handle(other, world.one, 0), Refused)
    high = replace(RESUME, client=at("C:779"), relay=at("K:45679"))
    assert world.relays.handle(high, world.one, 0) == Resumed(2)
    flow = world.nat.mappings.of_relay_port(at("K:45679"))
    assert flow is not None
    assert flow.seen == at("C:45679")


def test_values_that_were_in_force_at_different_times_are_not_believed_together(
    world: World,
) -> None:
    world.relays.remember(InForce(17000, addr("N"), Source.RELAY, frozenset({443})))

    for request in (
        replace(RESUME, gport=17000),
        replace(RESUME, server=at("N:443"), service=at("K:443")),
        replace(RESUME, gport=17000, server=at("N:80")),
        replace(RESUME, gport=17000, server=at("N:443"), source=Source.CLIENT),
    ):
        assert isinstance(world.relays.handle(request, world.one, 0), Refused), request
    good = replace(RESUME, gport=17000, server=at("N:443"), source=Source.RELAY)
    assert world.relays.handle(good, world.one, 0) == Resumed(2)
    assert world.relays.handle(replace(RESUME, relay=at("K:5")), world.one, 0) == Resumed(2)


@pytest.mark.parametrize("ends", [(at("K:16000"), C), (Y, S)])
@pytest.mark.parametrize("whose", [None, STRANGER])
def test_a_connection_that_this_user_does_not_have_is_not_resumed(
    world: World, ends: tuple[Endpoint, Endpoint], whose: int | None
) -> None:
    world.kernel.others[ends] = whose

    answer = world.relays.handle(RESUME, world.one, 0)

    assert answer == Refused(2, "can't be resumed: this user has no such connection")
    assert len(world.nat) == 0


def test_outside_of_a_restart_nothing_is_resumed_but_flows(world: World) -> None:
    world.relays.resumable_until = 5.0
    answer = world.relays.handle(RESUME, world.one, 5.0)
    assert answer == Refused(2, "can't be resumed: krelay has no flow of it")
    assert world.relays.handle(RESUME, world.one, 4.9) == Resumed(2)
    world.relays.lost(world.one, 6)

    assert world.relays.handle(RESUME, world.two, 7) == Resumed(2)


def test_a_flow_that_lives_is_resumed_by_its_own_user_when_its_tcp_relay_is_lost(
    world: World,
) -> None:
    flow = world.connected()
    stranger = world.joined(STRANGER)
    for other in (world.two, stranger):
        assert isinstance(world.relays.handle(RESUME, other, 1), Refused)
    world.relays.lost(world.one, 2)
    assert flow.orphaned
    assert isinstance(world.relays.handle(RESUME, stranger, 3), Refused)
    assert isinstance(world.relays.handle(Close(Y), stranger, 3), Refused)
    wrong = replace(RESUME, server=at("N:80"))
    assert isinstance(world.relays.handle(wrong, world.two, 3), Refused)

    assert world.relays.handle(RESUME, world.two, 3) == Resumed(2)
    assert not flow.orphaned


def test_no_clients_other_connection_is_displaced_by_one_that_is_resumed(world: World) -> None:
    """The port that the client's packets came from is tcp-relay's word alone."""
    flow = world.connected()
    request = replace(RESUME, client=at("C:7"), origin=C, relay=at("K:5"))

    answer = world.relays.handle(request, world.two, 0)

    assert answer == Refused(2, "can't be resumed: another flow has this client")
    assert all(rewrite.table[rewrite.old] is rewrite for rewrite in flow.rewrites.values())


def test_a_tcp_relay_that_resets_nothing_keeps_no_flow_that_was_ended(world: World) -> None:
    flow = world.connected()
    world.relays.abort(flow, 1)
    world.relays.on_time(1 + ABORT_WITHIN - 0.1)
    assert flow.closed_at is None
    world.relays.on_time(1 + ABORT_WITHIN)

    assert flow.state is State.CLOSED


def test_gateway_ports_are_remembered_for_those_who_are_still_in_their_queues(
    world: World,
) -> None:
    for gport in range(17000, 17000 + GPORTS_KEPT):
        world.relays.listens(world.one, gport)
    world.client()

    assert isinstance(world.relays.handle(OPEN, world.one, 0), Refused)
    world.relays.listens(world.one, 16000)
    assert isinstance(world.relays.handle(OPEN, world.one, 0), Opened)


# lost


def test_flows_that_nobody_comes_back_for_are_closed_after_the_grace(world: World) -> None:
    flow = world.connected()
    world.relays.lost(world.one, 10)

    world.relays.on_time(10 + ORPHAN_GRACE - 0.1)
    assert flow.closed_at is None
    world.relays.on_time(10 + ORPHAN_GRACE)
    assert flow.state is State.CLOSED


def test_losing_one_tcp_relay_is_not_losing_another(world: World) -> None:
    mine = world.connected()
    other = world.client(at("D:40000"))
    world.relays.handle(Open(1, at("D:40000"), 16000, at("K:45679")), world.two, 0)

    world.relays.lost(world.one, 0)
    world.relays.on_time(ORPHAN_GRACE)

    assert (mine.state, other.state) == (State.CLOSED, State.OPENING)


def test_a_tcp_relay_may_be_lost_twice_and_its_flows_have_their_grace_each_time(
    world: World,
) -> None:
    flow = world.connected()
    world.relays.lost(world.one, 0)
    world.relays.handle(RESUME, world.two, 1)
    world.relays.lost(world.two, 4)

    world.relays.on_time(ORPHAN_GRACE)
    world.relays.on_time(ORPHAN_GRACE + 4)

    assert flow.closed_at is not None
    assert flow.closed_at >= ORPHAN_GRACE


def test_owners_of_flows_that_are_no_more_are_forgotten(world: World) -> None:
    flow = world.connected()
    world.nat.end(flow)
    world.relays.on_time(1)

    assert world.relays._owner == {}
    world.relays.lost(world.one, 2)
    assert world.relays._orphans == []


# abort


def test_abort_is_told_to_the_flows_owner_alone(world: World) -> None:
    flow = world.connected()

    world.relays.abort(flow, 1)

    assert (world.one.said, world.two.said) == ([Abort(Y)], [])
    assert flow.closed_at is None, "its resets must still pass"
    world.relays.handle(Close(Y), world.one, 2)
    assert flow.closed_at == 2


def test_a_flow_without_an_owner_is_closed_at_once(world: World) -> None:
    flow = world.connected()
    world.relays.lost(world.one, 0)

    world.relays.abort(flow, 1)

    assert flow.closed_at == 1


def test_a_flow_that_tcp_relay_has_not_asked_for_waits_to_refuse_it(world: World) -> None:
    flow = world.client()
    flow.tracker.client_acked = True

    world.relays.abort(flow, 1)

    assert flow.closed_at is None
    assert world.relays.handle(OPEN, world.one, 2) == Refused(1, "the flow was ended")


def test_a_flow_whose_client_has_not_completed_its_handshake_ends_at_once(world: World) -> None:
    flow = world.client()
    flow.tracker.client_acked = False
    world.relays.abort(flow, 1)

    assert len(world.nat) == 0


def test_a_resumed_flow_can_be_aborted(world: World) -> None:
    world.relays.handle(RESUME, world.one, 0)
    [flow] = world.nat

    world.relays.abort(flow, 1)

    assert world.one.said == [Abort(Y)]
    assert flow.client.addr == addr("C")


@pytest.mark.parametrize(
    "request_",
    [
        replace(OPEN, client=Endpoint.of("2001:db8::1", 40000)),
        replace(OPEN, relay=Endpoint.of("::1", 45678)),
        Resume(1, C, 16000, Y, Endpoint.of("::1", 80)),
        Resume(1, C, 16000, Y, S, service=Endpoint.of("::1", 80)),
    ],
)
def test_addresses_of_another_family_are_refused(world: World, request_: Open | Resume) -> None:
    world.client()
    answer = world.relays.handle(request_, world.one, 0)

    assert answer == Refused(1, "only IPv4 addresses are relayed")
    assert len(world.nat) == 1


# reports


A, B = "aaaaaaaa", "bbbbbbbb"


def tell(world: World, who: TcpRelay, worker: str, **counts: int) -> None:
    assert world.relays.handle(Report(worker, counts), who, 0) is None


def shown(world: World) -> dict[str, int]:
    """The totals that aren't zero."""
    return {name: count for name, count in world.relays.totals.items() if count}


def test_before_any_report_all_known_figures_are_there_and_zero(world: World) -> None:
    assert world.relays.totals == dict.fromkeys([*GAUGES, *COUNTERS], 0)


def test_a_report_takes_the_place_of_the_one_before(world: World) -> None:
    tell(world, world.one, A, open=3, accepted=10, held=500)
    tell(world, world.one, A, open=1, accepted=12)

    assert shown(world) == {"open": 1, "accepted": 12}


def test_the_workers_that_are_connected_are_summed_up_by_name(world: World) -> None:
    tell(world, world.one, A, open=3, accepted=10, from_client=2**63 - 1)
    tell(world, world.two, B, open=2, refused=1, from_client=2**63 - 1)

    assert shown(world) == {"open": 5, "accepted": 10, "refused": 1, "from_client": 2**64 - 2}


def test_totals_have_the_same_order_whoever_tells_what_first(world: World) -> None:
    tell(world, world.one, A, f=1, d=1, b=1, from_server=1, held=1)
    tell(world, world.two, B, e=1, c=1, a=1, accepted=1, open=1)

    assert list(world.relays.totals) == [*GAUGES, *COUNTERS, *"abcdef"]


def test_who_is_gone_has_nothing_open_but_has_counted(world: World) -> None:
    tell(world, world.one, A, open=3, held=77, accepted=10, zebra=2)
    tell(world, world.two, B, open=1, held=1, accepted=1)

    world.relays.lost(world.one, 1)

    assert shown(world) == {"open": 1, "held": 1, "accepted": 11, "zebra": 2}


def test_a_worker_that_reconnects_is_not_counted_twice(world: World) -> None:
    tell(world, world.one, A, open=3, accepted=10)
    world.relays.lost(world.one, 1)

    tell(world, world.two, A, open=4, accepted=11)

    assert shown(world) == {"open": 4, "accepted": 11}
    world.relays.lost(world.two, 2)
    assert shown(world) == {"accepted": 11}


def test_a_worker_may_be_back_before_its_old_connection_is_known_to_be_lost(world: World) -> None:
    tell(world, world.one, A, open=3, accepted=10)
    tell(world, world.two, A, open=4, accepted=11)
    assert shown(world) == {"open": 4, "accepted": 11}

    world.relays.lost(world.one, 1)

    assert shown(world) == {"open": 4, "accepted": 11}


def test_another_process_adds_to_what_the_one_before_it_counted(world: World) -> None:
    tell(world, world.one, A, open=3, accepted=10)
    world.relays.lost(world.one, 1)
    tell(world, world.two, B, open=1, accepted=1)

    assert shown(world) == {"open": 1, "accepted": 11}


def test_a_connection_speaks_for_one_worker_at_a_time(world: World) -> None:
    tell(world, world.one, A, open=3, accepted=10)
    tell(world, world.one, B, open=1, accepted=1)

    assert shown(world) == {"open": 1, "accepted": 11}


def test_totals_stay_when_the_oldest_of_many_that_are_gone_are_forgotten(world: World) -> None:
    for number in range(GONE_KEPT + 20):
        tell(world, world.one, f"{number:08x}", open=1, accepted=1)
        world.relays.lost(world.one, 0)

    assert shown(world) == {"accepted": GONE_KEPT + 20}
    assert len(world.relays._reports._gone) == GONE_KEPT
    tell(world, world.one, f"{GONE_KEPT + 19:08x}", accepted=2)
    assert shown(world) == {"accepted": GONE_KEPT + 21}, "the latest is still known"


def test_a_worker_that_goes_on_reporting_makes_nobody_forgotten(world: World) -> None:
    for number in range(GONE_KEPT):
        tell(world, world.two, f"{number:08x}", accepted=1)
    world.relays.lost(world.two, 1)
    for _ in range(3):
        tell(world, world.one, A)

    for number in range(GONE_KEPT):
        tell(world, TcpRelay(), f"{number:08x}", accepted=1)

    assert shown(world) == {"accepted": GONE_KEPT}


def test_a_tcp_relay_that_makes_up_workers_and_names_fills_no_memory(world: World) -> None:
    for number in range(2 * GONE_KEPT):
        name = "".join(chr(ord("a") + int(digit)) for digit in str(number))
        tell(world, world.one, f"{number:08x}", **{f"{name}_{i}": 1 for i in "abc"})

    assert len(world.relays._reports._gone) == GONE_KEPT
    assert len(world.relays._reports._forgotten) == MAX_COUNTS
    assert len(world.relays._reports._here) == 1


def test_what_is_kept_of_the_gone_holds_no_connection(world: World) -> None:
    tell(world, world.one, A, open=3, accepted=10)
    world.relays.lost(world.one, 1)

    assert world.relays._reports._here == {}
