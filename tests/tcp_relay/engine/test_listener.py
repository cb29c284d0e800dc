"""Accepting: bounded per turn, and paused while descriptors are out."""

import errno
import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from knet.log import Throttle
from knet.loop import Loop
from tcp_relay.engine import listener as module
from tcp_relay.engine.listener import PER_TURN, Listener
from tcp_relay.engine.sockets import Socket, accept, server_socket
from tests.tcp_relay.helpers import LOCALHOST, free_port, run_until, turns


class Rig:
    def __init__(self) -> None:
        self.loop = Loop()
        self.count = 0
        self.has_descriptors = True
        self.listener = Listener(self.loop, free_port(), self.take, spare=self.spare)

    def take(self, client: Socket, server: Socket, _: tuple[Any, ...]) -> None:
        self.count += 1
        client.close()
        server.close()

    def spare(self) -> Socket:
        if not self.has_descriptors:
            raise OSError(errno.EMFILE, "too many open files")
        return server_socket()

    def knock(self, times: int) -> None:
        for _ in range(times):
            socket.create_connection((LOCALHOST, self.listener.port)).close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    with rig.loop:
        yield rig
        rig.listener.abandon()


def test_a_turn_accepts_so_many_and_the_next_one_the_rest(rig: Rig) -> None:
    rig.knock(PER_TURN + 5)
    turns(rig.loop)
    assert rig.count == PER_TURN
    turns(rig.loop)
    assert rig.count == PER_TURN + 5


@pytest.mark.parametrize("clients", [1, PER_TURN - 1, PER_TURN])
def test_a_spare_socket_is_in_hand_whenever_a_turn_is_over(rig: Rig, clients: int) -> None:
    rig.knock(clients)
    turns(rig.loop)
    assert rig.count == clients
    rig.has_descriptors = False
    rig.knock(1)
    turns(rig.loop)
    assert rig.count == clients + 1


def test_without_descriptors_it_pauses_until_told_or_until_a_while_has_passed(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PAUSE", 0.05)
    rig.has_descriptors = False
    rig.knock(1)
    turns(rig.loop)
    assert rig.listener.paused
    assert rig.loop._epoll.poll(0) == []  # nothing to spin on
    rig.listener.resume()
    assert not rig.listener.paused
    turns(rig.loop)
    assert rig.listener.paused
    rig.has_descriptors = True
    run_until(rig.loop, lambda: rig.count == 1)
    assert not rig.listener.paused


def test_many_pauses_are_one_warning(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_complaints", Throttle())
    logger = logging.getLogger("krelay.listener")
    logger.addHandler(caplog.handler)
    rig.has_descriptors = False
    rig.knock(1)
    for _ in range(5):
        rig.listener.resume()
        turns(rig.loop)
        assert rig.listener.paused
    logger.removeHandler(caplog.handler)
    told = {id(record): record.getMessage() for record in caplog.records}
    assert list(told.values()) == ["accepting paused"]


def test_a_client_that_went_while_waiting_is_passed_over(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = [True]

    def flaky(listening: Socket, family: int) -> tuple[Socket, tuple[Any, ...]]:
        if gone and gone.pop():
            raise ConnectionAbortedError(errno.ECONNABORTED, "aborted")
        return accept(listening, family)

    monkeypatch.setattr(module, "accept", flaky)
    rig.knock(1)
    turns(rig.loop)
    assert rig.count == 1
    assert not rig.listener.paused


@pytest.mark.parametrize("has_descriptors", [True, False])
def test_a_listener_that_is_closed_stays_closed_whoever_makes_room(has_descriptors: bool) -> None:
    """Connections go on ending after it, and each end says that there is room (on_room)."""
    rig = Rig()
    with rig.loop:
        rig.has_descriptors = has_descriptors
        rig.knock(1)
        turns(rig.loop)
        rig.listener.close()
        rig.listener.resume()
        turns(rig.loop)
        with pytest.raises(ConnectionRefusedError):
            rig.knock(1)


def test_closing_accepts_who_was_waiting(rig: Rig) -> None:
    rig.knock(PER_TURN + 5)
    other = Rig()
    with other.loop:
        other.knock(PER_TURN + 5)
        other.listener.close()
        assert other.count == PER_TURN + 5


def test_a_port_is_shared_only_if_all_say_so() -> None:
    def nobody(*_: object) -> None:
        raise AssertionError

    with Loop() as loop:
        port = free_port()
        one = Listener(loop, port, nobody, shared=True)
        with pytest.raises(OSError, match="Address already in use"):
            Listener(loop, port, nobody)
        two = Listener(loop, port, nobody, shared=True)
        one.abandon()
        two.abandon()


def test_all_addresses_of_ipv6_leave_the_port_to_ipv4() -> None:
    peers: list[str] = []

    def take(client: Socket, server: Socket, peer: tuple[Any, ...]) -> None:
        peers.append(peer[0])
        client.close()
        server.close()

    with Loop() as loop:
        port = free_port()
        listeners = [Listener(loop, port, take, address=host) for host in ("::", "0.0.0.0")]
        for host in ("::1", LOCALHOST):
            socket.create_connection((host, port)).close()
        turns(loop, 2)
        for listener in listeners:
            listener.abandon()
    assert sorted(peers) == [LOCALHOST, "::1"]


def test_beyond_the_room_clients_stay_in_the_queue(rig: Rig) -> None:
    room = 2
    rig.listener._room = lambda: room - rig.count
    rig.knock(3)
    turns(rig.loop, 2)
    assert (rig.count, rig.listener.paused) == (2, True)
    room = 3
    rig.listener.resume()
    turns(rig.loop)
    assert rig.count == 3


def test_a_client_that_cannot_be_waited_for_is_kept_and_handed_over_later(rig: Rig) -> None:
    """epoll_ctl: ENOSPC, fs.epoll.max_user_watches."""
    taken: list[Socket] = []
    errors = [OSError(errno.ENOSPC, "no space"), OSError(errno.ENOMEM, "no memory")]

    def take(client: Socket, server: Socket, _: tuple[Any, ...]) -> None:
        if errors:
            raise errors.pop()
        taken.extend((client, server))

    rig.listener._accepted = take
    with socket.create_connection((LOCALHOST, rig.listener.port)) as client:
        for _ in range(3):
            turns(rig.loop)
            rig.listener.resume()
        turns(rig.loop)
        accepted, server = taken
        accepted.send(b"at last")
        assert client.recv(10) == b"at last"
    accepted.close()
    server.close()


def test_who_is_kept_is_reset_when_nothing_is_accepted_any_more(rig: Rig) -> None:
    def take(client: Socket, server: Socket, _: tuple[Any, ...]) -> None:
        raise OSError(errno.ENOSPC, "no space")

    rig.listener._accepted = take
    with socket.create_connection((LOCALHOST, rig.listener.port)) as client:
        turns(rig.loop)
        rig.listener.abandon()
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    rig.listener = Listener(rig.loop, free_port(), rig.take)


def test_a_listener_that_cannot_be_put_back_is_tried_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.has_descriptors = False
    rig.knock(1)
    turns(rig.loop)
    rig.has_descriptors = True
    with monkeypatch.context() as patch:
        patch.setattr(rig.loop, "add", _no_memory)
        rig.listener.resume()
    assert rig.listener.paused
    rig.listener.resume()
    turns(rig.loop)
    assert rig.count == 1


def _no_memory(*_: object) -> None:
    raise OSError(errno.ENOMEM, "no memory")
