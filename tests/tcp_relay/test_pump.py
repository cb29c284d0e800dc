"""The pump on real sockets of the loopback, without krelay."""

import errno
import socket
from collections.abc import Callable, Iterator
from itertools import pairwise

import pytest

from krelay.loop import Loop
from tcp_relay.half import LIMIT
from tcp_relay.listener import server_socket, set_options
from tcp_relay.pump import Pump
from tests.tcp_relay.helpers import BOUND, LOCALHOST, free_port, run_until, was_reset


class Owner:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def connected(self) -> None:
        self.told.append("connected")

    def connect_failed(self, error: int) -> None:
        self.told.append(errno.errorcode[error])

    def ended(self, reason: str) -> None:
        self.told.append(reason)


class Rig:
    """client - pump - server, all four ends in this process."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.owner = Owner()
        with socket.create_server((LOCALHOST, 0)) as listening:
            set_options(listening)
            self.client = socket.create_connection(listening.getsockname(), timeout=BOUND)
            accepted, _ = listening.accept()
            self.pump = Pump(loop, self.owner, accepted)
            self.pump.use_server(server_socket())
            self.pump.connect(listening.getsockname())
            self.server, _ = listening.accept()
        self.server.settimeout(BOUND)

    def run_until(self, condition: Callable[[], bool]) -> None:
        run_until(self.loop, condition)


@pytest.fixture
def rig() -> Iterator[Rig]:
    with Loop() as loop:
        rig = Rig(loop)
        with rig.client, rig.server:
            yield rig
            rig.pump.abort()


def test_both_ends_of_file_end_it_in_order(rig: Rig) -> None:
    rig.client.sendall(b"question")
    rig.client.shutdown(socket.SHUT_WR)
    rig.server.sendall(b"answer")
    rig.server.shutdown(socket.SHUT_WR)
    rig.run_until(lambda: not rig.pump.alive)
    assert rig.owner.told == ["connected", "closed"]
    assert (rig.server.recv(99), rig.server.recv(99)) == (b"question", b"")
    assert (rig.client.recv(99), rig.client.recv(99)) == (b"answer", b"")


def test_a_stalled_sink_bounds_what_is_held(rig: Rig) -> None:
    rig.client.setblocking(False)
    sent = 0
    stalled = [False]

    def push() -> bool:
        nonlocal sent
        try:
            while True:
                sent += rig.client.send(bytes(65536))
        except BlockingIOError:
            up = rig.pump.pair.up
            before, stalled[0] = stalled[0], len(up.held) == LIMIT and not up.writable
            return before and stalled[0]

    rig.run_until(push)
    assert len(rig.pump.pair.up.held) == LIMIT
    rig.client.shutdown(socket.SHUT_WR)
    received = 0
    rig.server.setblocking(False)

    def pull() -> bool:
        nonlocal received
        try:
            while data := rig.server.recv(65536):
                received += len(data)
        except BlockingIOError:
            return False
        return True

    rig.run_until(pull)
    assert received == sent


def test_a_turn_is_bounded(rig: Rig) -> None:
    rig.run_until(lambda: rig.pump.is_connected)
    rig.client.setblocking(False)
    sent = _fill(rig.client)
    assert sent > 4 * LIMIT
    moved: list[int] = []

    def note() -> None:
        moved.append(rig.pump.pair.up.moved)
        if len(moved) > 4:
            rig.loop.stop()
        else:
            rig.loop.call_soon(note)

    rig.loop.call_soon(note)
    rig.loop.run()
    assert moved[-1] > LIMIT  # it goes on by itself
    # Once for the event, once more at the end of the loop's turn, behind everybody else's events.
    assert all(after - before <= 2 * LIMIT for before, after in pairwise(moved))


def _fill(sock: socket.socket) -> int:
    sent = 0
    try:
        while True:
            sent += sock.send(bytes(65536))
    except BlockingIOError:
        return sent


def test_a_server_that_is_not_there_is_told_and_another_may_be_tried() -> None:
    with Loop() as loop:
        rig = Rig(loop)
        with rig.client, rig.server:
            rig.pump.abort()
        owner = Owner()
        one, other = socket.socketpair()
        with one:
            pump = Pump(loop, owner, other)
            pump.use_server(server_socket())
            pump.connect((LOCALHOST, free_port()))
            loop.call_soon(loop.stop)
            loop.run()
            loop.call_at(loop.now + 0.01, loop.stop)
            loop.run()
            assert owner.told == ["ECONNREFUSED"]
            with socket.create_server((LOCALHOST, 0)) as listening:
                pump.use_server(server_socket())
                pump.connect(listening.getsockname())
                loop.call_at(loop.now + 0.01, loop.stop)
                loop.run()
            assert owner.told == ["ECONNREFUSED", "connected"]
            pump.abort()


def test_an_abort_resets_both_sides_and_says_nothing(rig: Rig) -> None:
    rig.run_until(lambda: rig.pump.is_connected)
    rig.pump.abort()
    rig.pump.abort()
    assert was_reset(rig.client)
    assert was_reset(rig.server)
    assert rig.owner.told == ["connected"]
