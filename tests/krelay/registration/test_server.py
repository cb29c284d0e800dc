"""The relay socket between a loop and tcp-relays that behave, leave, babble or don't read."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from knet import descriptors
from knet.endpoint import Source
from knet.loop import HOST_FAILS, Loop
from knet.socketdiag import SocketDiag
from knet.unixsock import Peer
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.registration.gatewayports import GatewayPorts
from krelay.registration.messages import (
    MAX_MESSAGE,
    Abort,
    Close,
    Open,
    Opened,
    Refused,
    Report,
    Request,
    emit,
    parse_answer,
)
from krelay.registration.registry import Relays, Send
from krelay.registration.server import MAX_OF_ONE, TOLD_AT_ONCE, RelaySocket
from tests.tools.packets import at, policy
from tests.tools.sockets import OneUser

RELAY_PORT = 10_000
"""By so much the relay's port is less than the client's."""
UNKNOWN = Open(7, at("D:9"), 16000, at("K:45000"))
NO_FLOW = emit(Refused(7, "no row for this client"))


class ToldRelays(Relays):
    """Relays that remember which connections they were told to be lost."""

    def __init__(self, nat: NatTable) -> None:
        self.kernel = OneUser(os.getuid())
        super().__init__(nat, policy, self.kernel)
        self.losses: list[tuple[Send, float]] = []

    def lost(self, send: Send, now: float) -> None:
        self.losses.append((send, now))
        super().lost(send, now)


class World:
    """A relay socket, its tcp-relays, and the turns of the loop between them."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "relay.sock"
        self.loop = Loop()
        self.nat = NatTable(FlowLimits(flows_per_client=20_000), rng=Random(1))
        self.relays = ToldRelays(self.nat)
        self.diag = SocketDiag()
        self.gateways = GatewayPorts(
            descriptors.cookie_of_listener, self.diag.listeners, descriptors.close_all
        )
        self.socket = RelaySocket(self.loop, directory, self.relays, self.gateways)
        self.links: list[socket.socket] = []

    def close(self) -> None:
        self.socket.close()
        self.diag.close()
        self.loop.close()
        for link in self.links:
            link.close()

    def turn(self) -> None:
        """One turn, with what is ready now."""
        self.loop.call_soon(lambda: self.loop.call_soon(self.loop.stop))
        self.loop.run()

    def connect(self) -> socket.socket:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.links.append(link)
        link.connect(str(self.path))
        link.setblocking(False)
        known = set(self.relays._links)
        self.turn()
        for send in set(self.relays._links) - known:
            self.relays.listens(send, 16000)
        return link

    def say(self, link: socket.socket, *messages: Request | bytes) -> None:
        for message in messages:
            link.send(message if isinstance(message, bytes) else emit(message))
        self.turn()

    def flow(self, number: int) -> tuple[Flow, Open]:
        """A client's flow, and the query of the tcp-relay that has accepted it."""
        client, relay = at(f"C:{number}"), at(f"K:{number - RELAY_PORT}")
        flow = self.nat.open_tcp(
            client, at("K:80"), at("S:80"), Source.CLIENT, 16000, self.loop.now
        )
        flow.tracker.client_acked = True
        return flow, Open(number, client, 16000, relay)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def heard(link: socket.socket) -> list[bytes]:
    """All that has come, a packet each; an empty one at the end if the other side hung up."""
    packets = []
    while True:
        try:
            packets.append(link.recv(MAX_MESSAGE))
        except BlockingIOError:
            return packets
        except ConnectionResetError:
            continue  # it was hung up on with something unread; what it had said still comes
        if not packets[-1]:
            return packets


def test_each_request_has_its_answer_and_close_has_none(world: World) -> None:
    link = world.connect()
    flow, request = world.flow(40000)
    world.say(link, request, Close(at("K:30001")), UNKNOWN)

    assert [*map(parse_answer, heard(link))] == [
        Opened(40000, at("S:80"), Source.CLIENT),
        Refused(7, "no row for this client"),
    ]
    assert flow.relay == at("K:30000")


def test_the_kernel_is_asked_once_for_all_clients_that_come_together(world: World) -> None:
    """Whoever's handshake it has completed by itself is known by that."""
    link = world.connect()
    pairs = [world.flow(40000 + each) for each in range(5)]
    for flow, _ in pairs[1:]:
        flow.tracker.client_acked = False
    world.say(link, *(request for _, request in pairs), UNKNOWN, b"nonsense")

    asked = [(at("K:16000"), request.client) for _, request in pairs[1:]]
    assert world.relays.kernel.asked == [asked]
    answers = [parse_answer(each) for each in heard(link) if each]
    assert [type(each) for each in answers] == [Opened] * 5 + [Refused] * 2


def test_who_wants_to_know_is_told_before_answers_are_sent(world: World) -> None:
    """Also before the last answer of who has said nonsense behind its query."""
    link = world.connect()
    flow, request = world.flow(40000)
    seen: list[object] = []
    world.relays.before_answers = lambda: seen.append((flow.relay, heard(link)))
    world.say(link, request, UNKNOWN, b"nonsense")

    assert seen == [(at("K:30000"), [])]
    assert [type(parse_answer(each)) for each in heard(link)[:3]] == [Opened, Refused, Refused]
    world.say(world.connect(), Close(at("K:39999")))
    assert len(seen) == 1


def test_a_report_has_no_answer_and_counts_while_its_connection_lives(world: World) -> None:
    one, two = world.connect(), world.connect()
    world.say(one, Report("aaaaaaaa", {"open": 2, "accepted": 5}), UNKNOWN)
    world.say(two, Report("bbbbbbbb", {"open": 1, "accepted": 1}))

    assert (heard(one), heard(two)) == ([NO_FLOW], [])
    assert (world.relays.totals["open"], world.relays.totals["accepted"]) == (3, 6)
    one.close()
    world.turn()
    assert (world.relays.totals["open"], world.relays.totals["accepted"]) == (1, 6)
    world.say(world.connect(), Report("aaaaaaaa", {"open": 2, "accepted": 7}))
    assert (world.relays.totals["open"], world.relays.totals["accepted"]) == (3, 8)


def test_who_is_connected_is_known_by_its_process(world: World) -> None:
    assert world.socket.pids == frozenset()
    link = world.connect()
    assert world.socket.pids == {os.getpid()}
    link.close()
    world.turn()

    assert world.socket.pids == frozenset()


@pytest.mark.parametrize(
    "message",
    [
        b"garbage",
        b'{"op":"steal"}',
        b'{"op":"report","worker":"aaaaaaaa","counts":{"open":-1}}',
        emit(UNKNOWN).ljust(MAX_MESSAGE + 1),
    ],
)
def test_a_malformed_message_is_refused_and_ends_that_connection_alone(
    world: World, message: bytes
) -> None:
    other, link = world.connect(), world.connect()
    world.say(link, message, UNKNOWN)
    error, end = heard(link)

    refused = parse_answer(error)
    assert isinstance(refused, Refused)
    assert refused.id is None
    assert end == b""
    assert len(world.relays.losses) == 1
    world.say(other, UNKNOWN)
    assert heard(other) == [NO_FLOW]


def test_a_lost_connection_is_told_once_and_its_flows_become_orphans(world: World) -> None:
    link = world.connect()
    flow, request = world.flow(40000)
    world.say(link, request)
    link.close()
    world.turn()
    world.turn()

    assert len(world.relays.losses) == 1
    world.relays.on_time(world.loop.now + 60)
    assert flow.closed_at is not None
    world.socket.close()
    assert len(world.relays.losses) == 1
    world.socket = RelaySocket(world.loop, world.path.parent, world.relays, world.gateways)


def test_an_abort_goes_to_the_connection_that_opened_the_flow(world: World) -> None:
    one, two = world.connect(), world.connect()
    first, asked_first = world.flow(40000)
    second, asked_second = world.flow(40001)
    world.say(one, asked_first)
    world.say(two, asked_second)
    for link in (one, two):
        assert len(heard(link)) == 1
    world.relays.abort(second, world.loop.now)
    assert (heard(one), [*map(parse_answer, heard(two))]) == ([], [Abort(at("K:30001"))])
    world.relays.abort(first, world.loop.now)

    assert ([*map(parse_answer, heard(one))], heard(two)) == ([Abort(at("K:30000"))], [])


def test_who_does_not_read_its_answers_is_disconnected_once_they_fill_the_socket(
    world: World,
) -> None:
    link = world.connect()
    for _ in range(200_000):
        try:
            link.send(emit(UNKNOWN))
        except BlockingIOError:
            world.turn()
        except (BrokenPipeError, ConnectionResetError):
            break
    else:
        raise AssertionError("still connected after 200,000 requests")

    assert len(world.relays.losses) == 1
    assert world.socket.pids == frozenset()
    answers = heard(link)
    assert set(answers[:-1]) == {NO_FLOW}
    assert answers[-1] == b""


def test_aborts_that_fill_the_socket_close_it_after_the_caller_is_through(world: World) -> None:
    link = world.connect()
    flows = []
    for number in range(20_000, 40_000):
        flow, request = world.flow(number)
        flows.append(flow)
        world.relays.handle(request, _send_of(world), world.loop.now)
    for flow in flows:
        world.relays.abort(flow, world.loop.now)
        assert world.relays.losses == []
    world.turn()

    assert len(world.relays.losses) == 1
    *aborts, end = heard(link)
    assert 0 < len(aborts) < len(flows)
    assert parse_answer(aborts[0]) == Abort(at("K:10000"))
    assert end == b""


def _send_of(world: World) -> Send:
    (link,) = world.socket._links
    return link._send


def test_closing_ends_all_connections_and_removes_the_socket(world: World) -> None:
    one, two = world.connect(), world.connect()
    world.socket.close()

    assert (heard(one), heard(two)) == ([b""], [b""])
    assert len({send for send, _ in world.relays.losses}) == 2
    assert not world.path.exists()
    world.socket = RelaySocket(world.loop, world.path.parent, world.relays, world.gateways)


def test_who_comes_and_goes_without_pause_does_not_fill_the_log(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "krelay")
    for _ in range(3 * TOLD_AT_ONCE):
        world.connect().close()
        world.turn()
    told = [record.getMessage() for record in caplog.records]

    assert TOLD_AT_ONCE <= told.count("tcp-relay connected") < 2 * TOLD_AT_ONCE
    assert told.count("tcp-relay disconnected") <= told.count("tcp-relay connected")
    assert not world.socket.pids


def test_a_user_has_so_many_connections_and_no_more(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    member = Peer(1, 1000, 1000)
    monkeypatch.setattr("knet.unixsock._peer", lambda _: member)
    monkeypatch.setattr(Peer, "may_connect", lambda *_: True)
    links = [world.connect() for _ in range(MAX_OF_ONE + 5)]
    for _ in range(5):
        world.turn()
    refused = [said for link in links if (said := heard(link))]

    assert len(refused) == 5
    assert all(b"a user has at most 128" in said[0] and said[-1] == b"" for said in refused)
    monkeypatch.setattr("knet.unixsock._peer", lambda _: Peer(2, 0, 0))
    assert heard(world.connect()) == []
    for link in links:
        link.close()
    for _ in range(5):
        world.turn()
    member = Peer(3, 1000, 1000)
    monkeypatch.setattr("knet.unixsock._peer", lambda _: member)
    assert heard(world.connect()) == []


class FailingOnce:
    """A connection of which one method fails, the first time, without having done anything."""

    def __init__(self, connection: socket.socket, method: str, number: int) -> None:
        self._connection, self._method, self._number = connection, method, number

    def __getattr__(self, name: str) -> Any:
        if name != self._method:
            return getattr(self._connection, name)
        self._method = ""
        return self._fails

    def _fails(self, *_: object) -> None:
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize("method", ["recvmsg", "send"])
@pytest.mark.parametrize("number", sorted(HOST_FAILS))
def test_a_host_that_fails_once_loses_no_tcp_relay(world: World, method: str, number: int) -> None:
    link = world.connect()
    (ours,) = world.socket._links
    ours._socket = FailingOnce(ours._socket, method, number)  # type: ignore[assignment]
    _, query = world.flow(RELAY_PORT + 1)
    world.say(link, query)
    world.turn()

    (answer,) = heard(link)
    assert b'"server"' in answer
    assert world.relays.losses == []
