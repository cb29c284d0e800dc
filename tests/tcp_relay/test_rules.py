"""What both programs promise about hung, rude and missing peers, seen at tcpproxy from outside.

Each test is named by the promise.  How each comes about is in test_pump.py, step by step; here it
is the program, with limits that make waiting short.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.tcp_relay.helpers import (
    BOUND,
    LOCALHOST,
    Server,
    TcpProxy,
    echo,
    everything,
    exactly,
    fill,
    free_port,
    full_server,
    reset,
    until_closed,
    wait_for,
    was_reset,
)

Start = Callable[..., TcpProxy]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts tcpproxy to a port of the loopback."""
    with ExitStack() as stack:

        def start(port: int, *arguments: str) -> TcpProxy:
            return stack.enter_context(TcpProxy(tmp_path, LOCALHOST, port, *arguments)).ready()

        yield start


def echoes(client: socket.socket) -> bool:
    client.sendall(b"ping")
    return exactly(client, 4) == b"ping"


def test_no_client_can_hang_another_by_refusing_to_read(start: Start) -> None:
    with Server(echo) as server, ExitStack() as stack:
        proxy = start(server.endpoint.port, "--buffer", "64K", "--stall", "1")
        deaf = [stack.enter_context(proxy.dial()) for _ in range(5)]
        for client in deaf:
            fill(client)
        for _ in range(20):
            with proxy.dial() as client:
                assert echoes(client)
        for client in deaf:
            reset(client)


def test_held_bytes_that_nobody_takes_reset_both_sides_after_the_stall_limit(
    start: Start,
) -> None:
    ends: list[BaseException] = []
    begun: list[float] = []

    def flood(sock: socket.socket) -> None:
        begun.append(time.monotonic())
        try:
            while True:
                sock.sendall(bytes(65536))
        except OSError as error:
            ends.append(error)

    with Server(flood) as server:
        proxy = start(server.endpoint.port, "--buffer", "64K", "--stall", "0.5")
        with proxy.dial() as client:
            proxy.wait_for_log("reason=stalled")
            assert time.monotonic() - begun[0] >= 0.5
            assert was_reset(client)
            wait_for(lambda: ends, "the end at the server")
        assert isinstance(ends[0], ConnectionError)
    assert 'detail="the client took none of ' in proxy.log
    assert 'bytes for 0.5 s"' in proxy.log


def test_an_idle_connection_is_never_ended(start: Start) -> None:
    with Server(echo) as server:
        options = ("--stall", "0.3", "--half-close", "0.3", "--connect-timeout", "0.3")
        proxy = start(server.endpoint.port, *options)
        with proxy.dial() as client:
            for _ in range(3):
                threading.Event().wait(0.5)
                assert echoes(client)


def test_the_other_direction_goes_on_and_a_forgotten_one_is_ended(start: Start) -> None:
    with Server(until_closed_late) as server:
        proxy = start(server.endpoint.port, "--half-close", "1.5")
        with proxy.dial() as client:
            client.shutdown(socket.SHUT_WR)
            assert exactly(client, 10) == b"0123456789"  # it took longer than the limit
            assert was_reset(client)
    assert "reason=forgotten" in proxy.log


def until_closed_late(sock: socket.socket) -> None:
    """Goes on for a while after the end of file, then says nothing."""
    everything(sock)
    for number in range(10):
        threading.Event().wait(0.2)
        sock.sendall(b"%d" % number)
    with suppress(OSError):
        while True:  # waits for the reset: an end of file was read before
            threading.Event().wait(0.02)
            if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                return
            sock.send(b"")


@pytest.mark.serial
def test_a_server_that_refuses_resets_the_client_promptly_and_is_logged(start: Start) -> None:
    port = free_port()
    proxy = start(port)
    begun = time.monotonic()
    with suppress(ConnectionResetError), proxy.dial() as client:
        assert was_reset(client)
    assert time.monotonic() - begun < 2.0
    proxy.wait_for_log(f'reason=connect_failed detail="{LOCALHOST}:{port}: connection refused"')


def test_a_server_that_doesnt_answer_resets_the_client_after_the_connect_limit(
    start: Start,
) -> None:
    with full_server() as (_, port):
        proxy = start(port, "--connect-timeout", "0.3")
        begun = time.monotonic()
        with proxy.dial() as client:
            assert was_reset(client)
        assert time.monotonic() - begun >= 0.3
    proxy.wait_for_log(f'reason=connect_failed detail="127.0.0.1:{port}: connection timed out"')


@pytest.mark.serial
def test_out_of_descriptors_running_connections_go_on_and_accepting_resumes_by_itself(
    start: Start,
) -> None:
    with Server(echo) as server, ExitStack() as stack:
        proxy = start(server.endpoint.port)
        running = stack.enter_context(proxy.dial())
        assert echoes(running)
        proxy.limit_descriptors(3)  # for one more, and channel another
        clients = [stack.enter_context(proxy.dial()) for _ in range(6)]
        proxy.wait_for_log("accepting paused")
        before = proxy.wake_ups()
        for client in clients:
            assert echoes(running)
            assert echoes(client)
            client.close()
        assert proxy.wake_ups() - before < 1000
        assert proxy.log.count("accepting paused") == 1


def test_writing_to_the_gone_never_kills(start: Start) -> None:
    with Server(until_closed) as server:
        proxy = start(server.endpoint.port)
        for number in range(50):
            client = proxy.dial()
            client.sendall(bytes(100_000))
            if number % 2:
                reset(client)
            else:
                client.close()
        proxy.wait_for_log("reason=", times=50)
        assert proxy.process.poll() is None


@pytest.mark.serial
def test_idle_connections_cost_no_time(start: Start) -> None:
    with Server(until_closed) as server, ExitStack() as stack:
        proxy = start(server.endpoint.port)
        clients = [stack.enter_context(proxy.dial()) for _ in range(200)]
        proxy.wait_for_log("connection opened", times=200)
        for client in clients[::2]:
            client.sendall(b"x")
        proxy.wait_until_still()
        woken, used = proxy.wake_ups(), proxy.cpu()
        threading.Event().wait(0.5)
        assert proxy.wake_ups() - woken <= 1
        assert proxy.cpu() - used <= 0.02


@pytest.mark.serial
def test_a_connection_that_waits_costs_no_time(start: Start) -> None:
    """Stalled, half-closed, or connecting: only timers."""
    done = threading.Event()

    def says_nothing(_: socket.socket) -> None:
        done.wait(BOUND)

    with Server(says_nothing) as server, ExitStack() as stack:
        stack.callback(done.set)
        proxy = start(server.endpoint.port, "--buffer", "64K")
        with proxy.dial() as stalled, proxy.dial() as half_closed:
            fill(stalled)
            half_closed.shutdown(socket.SHUT_WR)
            proxy.wait_until_still()
            used = proxy.cpu()
            threading.Event().wait(0.3)
            assert proxy.cpu() - used <= 0.02
            reset(stalled)


def test_descriptors_afterwards_are_as_before(start: Start) -> None:
    with Server(echo) as server:
        proxy = start(server.endpoint.port)
        with proxy.dial() as client:
            assert echoes(client)
        proxy.wait_for_log("connection ended")
        before = proxy.descriptors()
        for _ in range(3):
            with ExitStack() as stack:
                clients = [stack.enter_context(proxy.dial()) for _ in range(50)]
                assert all(map(echoes, clients))
                for client in clients[::3]:
                    reset(client)
        wait_for(lambda: proxy.log.count("connection ended") == 151, "all to end")
        wait_for(lambda: proxy.descriptors() == before, "the descriptors to be closed")
