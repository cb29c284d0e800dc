"""How a relay program lives and ends, seen at tcpproxy; tcp-relay does it alike."""

import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.tcp_relay.helpers import (
    BOUND,
    Server,
    TcpProxy,
    echo,
    exactly,
    wait_for,
    was_reset,
)

Start = Callable[..., TcpProxy]


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(echo) as server:
        yield server


@pytest.fixture
def start(tmp_path: Path, server: Server) -> Iterator[Start]:
    with ExitStack() as stack:

        def start(*arguments: str) -> TcpProxy:
            endpoint = server.endpoint
            proxy = TcpProxy(tmp_path, endpoint.host, endpoint.port, *arguments)
            return stack.enter_context(proxy).ready()

        yield start


def echoes(client: socket.socket) -> bool:
    client.sendall(b"ping")
    return exactly(client, 4) == b"ping"


def test_a_drain_ends_when_the_last_connection_has_ended(start: Start) -> None:
    proxy = start()
    with proxy.dial() as one, proxy.dial() as two:
        assert echoes(one)
        assert echoes(two)
        proxy.process.send_signal(signal.SIGTERM)
        proxy.wait_for_log('draining connections=2 at_most="30 s"')
        with pytest.raises(ConnectionRefusedError):
            proxy.dial()
        assert echoes(one)
        one.close()
        assert echoes(two)
        assert proxy.process.poll() is None
    assert proxy.process.wait(BOUND) == 0
    assert proxy.log.count("reason=closed") == 2
    assert "stopped accepted=2 opened=2 closed=2" in proxy.log


def test_who_was_in_the_queue_is_served_still(start: Start) -> None:
    proxy = start()
    proxy.process.send_signal(signal.SIGSTOP)
    with proxy.dial() as client:
        proxy.process.send_signal(signal.SIGTERM)
        proxy.process.send_signal(signal.SIGCONT)
        assert echoes(client)
    assert proxy.process.wait(BOUND) == 0


def test_a_drain_without_connections_ends_at_once(start: Start) -> None:
    proxy = start()
    with proxy.dial() as client:
        assert echoes(client)
    proxy.wait_for_log("connection ended")
    assert proxy.end() == 0
    assert "draining" not in proxy.log


def test_after_the_drain_limit_who_is_left_is_reset(start: Start) -> None:
    proxy = start("--drain", "0.3")
    with proxy.dial() as client:
        assert echoes(client)
        begun = time.monotonic()
        assert proxy.end() == 0
        assert time.monotonic() - begun >= 0.3
        assert was_reset(client)
    assert 'reason=drained detail="it outlived the drain of 0.3 s"' in proxy.log


@pytest.mark.parametrize(("second", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_drain_at_once(start: Start, second: int, status: int) -> None:
    proxy = start("--drain", "3600")
    with proxy.dial() as client:
        assert echoes(client)
        proxy.process.send_signal(signal.SIGTERM)
        proxy.wait_for_log("draining")
        assert proxy.end(second) == status
        assert was_reset(client)
    assert 'reason=killed detail="the relay stops"' in proxy.log


def test_ctrl_c_ends_it_at_once(start: Start) -> None:
    proxy = start()
    with proxy.dial() as client:
        assert echoes(client)
        assert proxy.end(signal.SIGINT) == 130
        assert was_reset(client)
    assert "draining" not in proxy.log


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGPIPE])
def test_a_signal_that_means_nothing_loses_nothing(start: Start, signum: int) -> None:
    proxy = start()
    with proxy.dial() as client:
        assert echoes(client)
        for _ in range(3):
            proxy.process.send_signal(signum)
            assert echoes(client)
        with proxy.dial() as other:
            assert echoes(other)
    assert proxy.end() == 0


def test_sigusr1_shows_who_is_connected(start: Start) -> None:
    proxy = start()
    with proxy.dial() as client, proxy.dial() as finished:
        assert echoes(client)
        assert echoes(finished)
        proxy.process.send_signal(signal.SIGUSR1)
        proxy.wait_for_log("open=2 accepted=2 opened=2 from_client=8 from_server=8")
        host, port = client.getsockname()
        lines = [line for line in proxy.log.splitlines() if line.startswith(f"{host}:{port} ")]
        [line] = lines
        assert line.split()[2] == "open"
        assert line.split()[-3:] == ["4", "4", "0/0"]
        assert "CLIENT " in proxy.log
        assert echoes(client)


def test_running_out_of_descriptors_doesnt_disturb_a_drain(start: Start) -> None:
    """Accepting pauses, is stopped for good, and then a connection ends, which makes room."""
    proxy = start()
    with ExitStack() as stack:
        clients = [stack.enter_context(proxy.dial()) for _ in range(2)]
        assert all(map(echoes, clients))
        proxy.limit_descriptors(0)
        waiting = [stack.enter_context(proxy.dial()) for _ in range(2)]
        proxy.wait_for_log("accepting paused")
        proxy.process.send_signal(signal.SIGTERM)
        proxy.wait_for_log("draining")
        clients[0].close()
        proxy.wait_for_log("connection ended")
        assert echoes(clients[1])
        clients[1].close()
        assert proxy.process.wait(BOUND) == 0, proxy.log
        del waiting


def test_the_limit_of_descriptors_is_raised(start: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(200, hard), hard))
    try:
        proxy = start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    wait_for(
        lambda: resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE) == (hard, hard),
        "the limit to be raised",
    )
