"""How sockets are made, accepted and closed, as their peers see it."""

import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from tcp_relay.engine.sockets import (
    HASTE,
    Heard,
    Socket,
    accept,
    close_in_order,
    hasten,
    heard,
    own_address,
    probe_as_usual,
    probe_within,
    server_socket,
    set_options,
    take_time,
    undelivered,
    usual_rto_max,
)
from tests.tcp_relay.helpers import BOUND, LOCALHOST, everything, fill, wait_for, was_reset


class Both(NamedTuple):
    ours: Socket
    peer: socket.socket


@pytest.fixture
def both() -> Iterator[Both]:
    """A socket of ours, as accepted, and its peer's."""
    with socket.create_server((LOCALHOST, 0)) as listening:
        set_options(listening)
        peer = socket.create_connection(listening.getsockname(), timeout=BOUND)
        ours, _ = accept(listening, socket.AF_INET)
    with peer:
        yield Both(ours, peer)
        ours.close()


def options(sock: Socket) -> tuple[int, int, int, bytes]:
    return (
        sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE),
        sock.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8),
    )


ALL = (1, 1, 1, b"\1\0\0\0\0\0\0\0")


def test_an_accepted_socket_has_what_the_listening_one_was_given(both: Both) -> None:
    assert options(both.ours) == ALL
    assert both.ours.gettimeout() == 0.0
    assert both.ours.getsockname() == both.peer.getpeername()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_a_server_socket_has_it_too(family: socket.AddressFamily) -> None:
    sock = server_socket(family)
    assert options(sock) == ALL
    assert sock.gettimeout() == 0.0
    assert sock.family == family
    assert os.get_inheritable(sock.fileno()) is False
    sock.close()


def test_an_accepted_socket_is_not_inherited_by_children(both: Both) -> None:
    assert os.get_inheritable(both.ours.fileno()) is False


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, LOCALHOST), (socket.AF_INET6, "::1")]
)
def test_accept_tells_the_peer_and_that_nobody_waits(
    family: socket.AddressFamily, host: str
) -> None:
    with socket.create_server((host, 0), family=family) as listening:
        listening.setblocking(False)
        with pytest.raises(BlockingIOError):
            accept(listening, family)
        with socket.create_connection((host, listening.getsockname()[1])) as peer:
            ours, address = accept(listening, family)
            assert address == peer.getsockname()
            assert ours.family == family
            ours.close()


def test_closing_resets(both: Both) -> None:
    both.ours.close()
    assert was_reset(both.peer)


def test_closing_in_order_delivers_all_and_then_the_end(both: Both) -> None:
    sent = fill(both.ours)  # type: ignore[arg-type]
    close_in_order(both.ours)
    assert len(everything(both.peer)) == sent


def test_what_the_peer_hasnt_got_is_undelivered(both: Both) -> None:
    assert undelivered(both.ours) == 0
    both.ours.send(b"taken by its kernel")
    wait_for(lambda: undelivered(both.ours) == 0, "the acknowledgement")
    sent = fill(both.ours)  # type: ignore[arg-type]
    assert 0 < undelivered(both.ours) <= sent
    both.peer.setblocking(False)

    def all_read() -> bool:
        try:
            both.peer.recv(1 << 20)
        except BlockingIOError:
            return undelivered(both.ours) == 0
        return False

    wait_for(all_read, "all to be read")


def probing(sock: Socket) -> tuple[int, ...]:
    names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    return tuple(sock.getsockopt(socket.IPPROTO_TCP, name) for name in names)


@pytest.mark.parametrize(
    ("seconds", "idle", "interval"),
    [(10.0, 4, 2), (60.0, 24, 12), (4.0, 1, 1), (5.9, 2, 1), (0.5, 1, 1)],
)
def test_probes_tell_within_the_seconds(
    both: Both, seconds: float, idle: int, interval: int
) -> None:
    usual = probing(both.ours)
    probe_within(both.ours, seconds)
    assert probing(both.ours) == (idle, interval, 127), "who is lost isn't the kernel's to say"
    assert idle + 3 * interval <= max(seconds, 4)
    probe_as_usual(both.ours)
    assert probing(both.ours) == usual


def test_what_the_peer_was_heard_last_is_known(both: Both) -> None:
    both.ours.send(b"x")
    wait_for(lambda: heard(both.ours).in_flight == 0, "the acknowledgement")
    wait_for(lambda: heard(both.ours).ago > 0.05, "time to pass")
    assert heard(both.ours).acked == 1
    both.ours.send(b"yz")
    wait_for(lambda: heard(both.ours).ago < 0.05, "another acknowledgement")
    assert heard(both.ours).sent < 0.05
    wait_for(lambda: heard(both.ours).acked == 3, "what it took")


RESTS = Heard(probes=0, in_flight=0, sent=900.0, ago=900.0, acked=0)


@pytest.mark.parametrize(
    ("peer", "awake", "silent"),
    [
        (RESTS, 999, False),  # nobody asked it
        (RESTS._replace(probes=1), 999, False),  # a probe may be lost
        (RESTS._replace(probes=2), 999, True),
        (RESTS._replace(probes=9, ago=24.9), 999, False),
        (RESTS._replace(probes=9), 24.9, False),  # this process stood still until then
        (RESTS._replace(probes=9), 25.0, True),
        (RESTS._replace(in_flight=1, sent=12.0, ago=25.0), 999, True),
        (RESTS._replace(in_flight=1, sent=12.0, ago=24.9), 999, False),
        (RESTS._replace(in_flight=1, sent=0.9, ago=25.0), 999, False),  # the answer is on its way
        (RESTS._replace(in_flight=1, sent=50.1, ago=50.0), 999, False),  # it answered that
    ],
)
def test_silent_is_who_was_asked_and_says_nothing(peer: Heard, awake: float, silent: bool) -> None:
    assert peer.is_silent(25.0, awake) is silent


def test_a_slow_peers_kernel_answers_each_probe(both: Both) -> None:
    hasten(both.ours)
    fill(both.ours)  # type: ignore[arg-type]
    asked = []

    def probed() -> bool:
        peer = heard(both.ours)
        asked.append(peer.probes)
        assert not peer.is_silent(1.0, 999)
        return len(asked) > 1 and peer.ago < 0.1 < peer.sent

    wait_for(probed, "a probe of the closed window, and its answer")


def test_the_kernel_is_told_to_ask_often_and_no_longer(both: Both) -> None:
    usual = usual_rto_max()
    if not usual:
        pytest.skip("this kernel can't be told how often to ask (TCP_RTO_MAX_MS, from 6.15 on)")
    hasten(both.ours)
    assert both.ours.getsockopt(socket.IPPROTO_TCP, 44) == HASTE < usual
    take_time(both.ours)
    assert both.ours.getsockopt(socket.IPPROTO_TCP, 44) == usual


@pytest.mark.parametrize(
    ("family", "host"), [(socket.AF_INET, "127.0.0.9"), (socket.AF_INET6, "::1")]
)
def test_the_own_address_is_the_one_that_a_connection_would_have(family: int, host: str) -> None:
    with socket.create_server((host, 0), family=family) as listening:
        there = listening.getsockname()
        with socket.create_connection(there[:2]) as connected:
            assert own_address(family, there) == connected.getsockname()[0]


def test_a_place_that_cant_be_reached_has_no_own_address() -> None:
    with pytest.raises(OSError, match=r"denied|unreachable"):  # whatever routes this host has
        own_address(socket.AF_INET, ("255.255.255.255", 9))
