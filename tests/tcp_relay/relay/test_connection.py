"""One connection and an owner that this test is: which port, what is told, how it ends."""

import errno
import gc
import socket
import weakref
from collections.abc import Callable, Iterator

import pytest

from knet.endpoint import Endpoint, Source
from knet.loop import Loop
from krelay.registration.messages import NO_ADDRESS, PORT_TAKEN, Opened, Refused
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.legs import Legs
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.portqueue import PortWaitQueue
from tcp_relay.engine.session import End
from tcp_relay.engine.sockets import server_socket, set_options
from tcp_relay.engine.timeouts import FixedTimeoutQueue
from tcp_relay.relay.connection import PORT_TRIES, Connection
from tests.tcp_relay.helpers import (
    BOUND,
    LOCALHOST,
    free_port,
    full_server,
    reset,
    run_until,
    was_reset,
)

ASK_TIMEOUT = 0.1
LIMITS = SessionLimits(connect=0.1)


class Owner:
    """Keeps what it is told."""

    keeps_dscp = True

    def __init__(self, engine: Engine) -> None:
        self.asked: FixedTimeoutQueue[Legs] = FixedTimeoutQueue(
            engine.loop, ASK_TIMEOUT, lambda legs: legs.end(End.REFUSED, "no answer")
        )
        self.port_queue = PortWaitQueue(engine.loop, "more ports")
        self.registered: list[Endpoint] = []
        self.given_up: list[tuple[Endpoint, bool]] = []
        self.ports: list[int] = []
        self.taken = 0  # registrations still to be refused
        self.forgotten = 0

    def own_address(self, connection: Connection) -> str:
        return LOCALHOST

    def forget_address(self) -> None:
        self.forgotten += 1

    def next_port(self) -> int:
        return self.ports.pop() if self.ports else 0

    def register(self, connection: Connection) -> bool:
        if self.taken:
            self.taken -= 1
            return False
        assert connection.relay is not None
        self.registered.append(connection.relay)
        return True

    def unregister(self, connection: Connection, tell: bool) -> None:
        if connection.relay is not None:
            self.given_up.append((connection.relay, tell))


class Rig:
    """A client, and its connection as it is after accept."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.engine = Engine(self.loop, LIMITS)
        self.owner = Owner(self.engine)
        with socket.create_server((LOCALHOST, 0)) as listening:
            set_options(listening)
            self.client = socket.create_connection(listening.getsockname(), timeout=BOUND)
            accepted, peer = listening.accept()
            accepted.setblocking(False)
            self.gateway = Endpoint.of(*listening.getsockname())
        self.connection = Connection(self.engine, self.owner, self.gateway.port, accepted, peer)

    def ended(self) -> list[End]:
        return [end for end, count in self.engine.counts.ends.items() for _ in range(count)]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    with rig.loop, rig.client:
        yield rig
        rig.connection.abort(End.KILLED, "the test is over")


@pytest.mark.parametrize(("answers", "end"), [(False, End.REFUSED), (True, End.CONNECT_FAILED)])
def test_each_wait_ends(rig: Rig, answers: bool, end: End) -> None:
    rig.connection.begin(server_socket())
    with full_server() as address:
        begun = rig.loop.now
        if answers:
            rig.connection.opened(Opened(1, Endpoint.of(*address), Source.CLIENT))
        run_until(rig.loop, lambda: bool(rig.ended()))
        assert rig.loop.now - begun >= 0.1
    assert rig.ended() == [end]
    assert rig.owner.given_up == [(rig.owner.registered[0], True)]
    assert was_reset(rig.client)


def test_ports_that_somebody_listens_on_are_passed_over(rig: Rig) -> None:
    with socket.create_server((LOCALHOST, 0)) as other:
        free = free_port()
        rig.owner.ports = [free, *[other.getsockname()[1]] * 3]
        rig.connection.begin(server_socket())
        assert [relay.port for relay in rig.owner.registered] == [free]


def test_if_all_ports_tried_are_taken_the_kernel_chooses(rig: Rig) -> None:
    with socket.create_server((LOCALHOST, 0)) as other:
        rig.owner.ports = [other.getsockname()[1]] * 100
        rig.connection.begin(server := server_socket())
        assert rig.owner.registered == [Endpoint.of(*server.getsockname())]


def test_a_port_of_another_connection_is_not_asked_for(rig: Rig) -> None:
    rig.owner.taken = 3
    rig.connection.begin(server_socket())
    assert len(rig.owner.registered) == 1
    assert rig.owner.taken == 0
    assert not rig.owner.given_up


def test_who_finds_no_port_waits_and_is_served_when_there_is_one(rig: Rig) -> None:
    rig.owner.taken = PORT_TRIES
    rig.connection.begin(server_socket())
    assert rig.owner.taken == 0  # so many tries, and no more
    assert rig.connection.is_waiting_for_port
    assert len(rig.owner.port_queue) == 1
    run_until(rig.loop, lambda: bool(rig.owner.registered))
    assert not rig.connection.is_waiting_for_port
    assert not rig.ended()


def test_the_search_for_a_port_ends(rig: Rig) -> None:
    rig.owner.taken = 10_000
    rig.connection.begin(server_socket())
    run_until(rig.loop, lambda: bool(rig.ended()))
    assert rig.ended() == [End.CONNECT_FAILED]
    assert was_reset(rig.client)
    assert (10_000 - rig.owner.taken) % PORT_TRIES == 0


def test_a_client_that_goes_while_it_waits_for_a_port_is_not_tried(rig: Rig) -> None:
    rig.owner.taken = PORT_TRIES
    rig.connection.begin(server_socket())
    reset(rig.client)
    run_until(rig.loop, lambda: bool(rig.ended()))
    run_until(rig.loop, lambda: not rig.owner.port_queue)
    assert not rig.owner.registered


def test_a_port_that_cant_be_connected_from_is_replaced_by_telling_the_new_one(rig: Rig) -> None:
    """A close first would end the very connection."""
    rig.connection.begin(server_socket())
    [first] = rig.owner.registered
    rig.connection.connect_failed(errno.EADDRNOTAVAIL)
    assert rig.owner.given_up == [(first, False)]
    assert len(rig.owner.registered) == 2
    assert rig.connection.server is None


def test_a_refused_port_is_replaced_without_a_close(rig: Rig) -> None:
    rig.connection.begin(server_socket())
    rig.connection.refused(Refused(1, PORT_TAKEN))
    assert [tell for _, tell in rig.owner.given_up] == [False]
    assert len(rig.owner.registered) == 2


def test_an_address_that_has_just_gone_is_asked_for_again(rig: Rig) -> None:
    rig.connection.begin(server_socket())
    rig.connection.refused(Refused(1, NO_ADDRESS))
    assert rig.owner.forgotten == 1
    assert [tell for _, tell in rig.owner.given_up] == [False]
    assert len(rig.owner.registered) == 2


def test_the_service_is_the_servers_port_at_the_relays_address(rig: Rig) -> None:
    assert rig.connection.service is None
    rig.connection.begin(server_socket())
    with socket.create_server((LOCALHOST, 0)) as server:
        endpoint = Endpoint.of(*server.getsockname())
        rig.connection.opened(Opened(1, endpoint, Source.RELAY))
        assert rig.connection.service == Endpoint(rig.gateway.addr, endpoint.port)
        assert rig.connection.source is Source.RELAY
        peer, address = server.accept()
        peer.close()
        assert Endpoint.of(*address) == rig.owner.registered[0]


def _legs() -> int:
    return sum(isinstance(thing, Legs) for thing in gc.get_objects())


endings: list[Callable[[Connection], None]] = [
    lambda connection: connection.abort(End.KILLED, "no reason"),
    lambda connection: connection.refused(Refused(1, "no row")),
    lambda connection: connection.connect_failed(errno.ECONNREFUSED),
]


@pytest.mark.parametrize("end", endings)
def test_nothing_of_an_ended_connection_waits_for_the_collector(
    end: Callable[[Connection], None],
) -> None:
    rig = Rig()
    gc.collect()  # what other tests left
    gc.disable()
    try:
        with rig.loop, rig.client:
            connection = rig.connection
            legs = _legs()
            assert legs
            del rig.connection
            connection.begin(server_socket())
            end(connection)
            end(connection)  # once more does nothing
            assert len(rig.ended()) == 1
            held = weakref.ref(connection)
            del connection
            assert held() is None
            assert _legs() < legs
    finally:
        gc.enable()
