"""One connection and a desk that this test is: which port, what is told, how it ends."""

import errno
import gc
import socket
import weakref
from collections.abc import Callable, Iterator

import pytest

from krelay.flow import Endpoint, Source
from krelay.loop import Loop
from krelay.relaymsg import PORT_TAKEN, Opened, Refused
from tcp_relay import connection as module
from tcp_relay.connection import PORT_TRIES, Connection
from tcp_relay.listener import server_socket, set_options
from tests.tcp_relay.helpers import BOUND, LOCALHOST, free_port, was_reset


class Desk:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.registered: list[Endpoint] = []
        self.unregistered: list[tuple[Endpoint | None, bool]] = []
        self.over = 0
        self.ports: list[int] = []
        self.taken = 0  # registrations still to be refused

    def own_address(self, connection: Connection) -> str:
        return LOCALHOST

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
        self.unregistered.append((connection.relay, tell))

    def ended(self, connection: Connection) -> None:
        self.over += 1


class Rig:
    """A client, and its connection as it is after accept."""

    def __init__(self) -> None:
        self.loop = Loop()
        self.desk = Desk()
        with socket.create_server((LOCALHOST, 0)) as listening:
            set_options(listening)
            self.client = socket.create_connection(listening.getsockname(), timeout=BOUND)
            accepted, peer = listening.accept()
            self.gateway = Endpoint.of(*listening.getsockname())
        self.connection = Connection(self.loop, self.desk, accepted, peer)

    def run(self, seconds: float = 0.01) -> None:
        self.loop.call_at(self.loop.now + seconds, self.loop.stop)
        self.loop.run()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    with rig.loop, rig.client:
        yield rig
        rig.connection.abort("the test is over")


@pytest.mark.parametrize(
    ("constant", "answers"),
    [("ASK_TIMEOUT", False), ("CONNECT_TIMEOUT", True)],
)
def test_each_wait_ends(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, constant: str, answers: bool
) -> None:
    monkeypatch.setattr(module, constant, 0.05)
    rig.connection.begin(server_socket())
    with socket.socket() as full, socket.socket() as first:
        full.bind((LOCALHOST, 0))
        full.listen(0)
        first.connect(full.getsockname())  # the one that fits: the next SYN is dropped
        if answers:
            server = Endpoint.of(*full.getsockname())
            rig.connection.opened(Opened(1, server, Source.CLIENT))
        rig.run(0.03)
        assert rig.desk.over == 0
        rig.run(0.05)
    assert rig.desk.over == 1
    assert rig.desk.unregistered == [(rig.desk.registered[0], True)]
    assert was_reset(rig.client)


def test_ports_that_somebody_listens_on_are_passed_over(rig: Rig) -> None:
    with socket.create_server((LOCALHOST, 0)) as other:
        free = free_port()
        rig.desk.ports = [free, *[other.getsockname()[1]] * 3]
        rig.connection.begin(server_socket())
        assert [relay.port for relay in rig.desk.registered] == [free]


def test_if_all_ports_tried_are_taken_the_kernel_chooses(rig: Rig) -> None:
    with socket.create_server((LOCALHOST, 0)) as other:
        rig.desk.ports = [other.getsockname()[1]] * 100
        rig.connection.begin(server_socket())
    assert len(rig.desk.registered) == 1


def test_a_port_of_another_connection_is_not_asked_for(rig: Rig) -> None:
    rig.desk.taken = 3
    rig.connection.begin(server_socket())
    assert len(rig.desk.registered) == 1
    assert rig.desk.unregistered == [(None, True)] * 3


def test_the_search_for_a_port_ends(rig: Rig) -> None:
    rig.desk.taken = 100
    rig.connection.begin(server_socket())
    assert rig.desk.taken == 100 - PORT_TRIES
    assert rig.desk.over == 1
    assert was_reset(rig.client)


def test_a_port_that_cant_be_connected_from_is_told_and_replaced(rig: Rig) -> None:
    rig.connection.begin(server_socket())
    [first] = rig.desk.registered
    rig.connection.connect_failed(errno.EADDRNOTAVAIL)
    assert rig.desk.unregistered == [(first, True)]
    assert len(rig.desk.registered) == 2
    assert rig.connection.server is None


def test_a_refused_port_is_replaced_without_a_close(rig: Rig) -> None:
    rig.connection.begin(server_socket())
    rig.connection.refused(Refused(1, PORT_TAKEN))
    assert [tell for _, tell in rig.desk.unregistered] == [False]
    assert len(rig.desk.registered) == 2


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
        assert Endpoint.of(*address) == rig.desk.registered[0]


endings: list[Callable[[Connection], None]] = [
    lambda connection: connection.abort("no reason"),
    lambda connection: connection.refused(Refused(1, "no row")),
    lambda connection: connection.connect_failed(errno.ECONNREFUSED),
]


@pytest.mark.parametrize("end", endings)
def test_nothing_of_an_ended_connection_waits_for_the_collector(
    end: Callable[[Connection], None],
) -> None:
    rig = Rig()
    gc.disable()
    try:
        with rig.loop, rig.client:
            connection = rig.connection
            del rig.connection
            connection.begin(server_socket())
            end(connection)
            end(connection)  # once more does nothing
            assert rig.desk.over == 1
            held = weakref.ref(connection)
            del connection
            assert held() is None
    finally:
        gc.enable()
