"""Accepting: bounded per turn, and paused while descriptors are out."""

import errno
import socket
from collections.abc import Iterator

import pytest

from krelay.loop import Loop
from tcp_relay import listener as module
from tcp_relay.listener import PER_TURN, Listener
from tests.tcp_relay.helpers import LOCALHOST, free_port


class Rig:
    def __init__(self) -> None:
        self.loop = Loop()
        self.count = 0
        self.listener = Listener(self.loop, free_port(), self.take)

    def take(self, client: socket.socket, server: socket.socket, _: tuple[str, int]) -> None:
        self.count += 1
        client.close()
        server.close()

    def knock(self, times: int) -> None:
        for _ in range(times):
            socket.create_connection((LOCALHOST, self.listener.port)).close()

    def turn(self) -> None:
        self.loop.call_soon(lambda: self.loop.call_soon(self.loop.stop))
        self.loop.run()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    with rig.loop:
        yield rig
        rig.listener.abandon()


def test_a_turn_accepts_so_many_and_the_next_one_the_rest(rig: Rig) -> None:
    rig.knock(PER_TURN + 5)
    rig.turn()
    assert rig.count == PER_TURN
    rig.turn()
    assert rig.count == PER_TURN + 5


def test_without_descriptors_it_pauses_until_told_or_until_a_while_has_passed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.02)

    def none_left() -> socket.socket:
        raise OSError(errno.EMFILE, "too many open files")

    real = module.server_socket
    monkeypatch.setattr(module, "server_socket", none_left)
    rig.knock(1)
    rig.turn()
    assert rig.listener.paused
    assert rig.loop._epoll.poll(0) == []  # nothing to spin on
    rig.listener.resume()
    assert not rig.listener.paused
    rig.turn()
    assert rig.listener.paused
    monkeypatch.setattr(module, "server_socket", real)
    rig.loop.call_at(rig.loop.now + 0.05, rig.loop.stop)
    rig.loop.run()
    assert not rig.listener.paused
    assert rig.count == 1


def test_a_client_that_went_while_waiting_is_passed_over(rig: Rig) -> None:
    sock = rig.listener._socket
    real, gone = sock.accept, [True]

    class Flaky:
        def accept(self) -> tuple[socket.socket, tuple[str, int]]:
            if gone and gone.pop():
                raise ConnectionAbortedError(errno.ECONNABORTED, "aborted")
            return real()

    rig.knock(1)
    rig.listener._socket = Flaky()  # type: ignore[assignment]
    rig.turn()
    rig.listener._socket = sock
    assert rig.count == 1
    assert not rig.listener.paused
