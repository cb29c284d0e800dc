"""With few descriptors clients wait: nobody is reset, and nothing ends for want of one."""

import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.tcp_relay.fake_krelay import FakeKrelay
from tests.tcp_relay.helpers import (
    LOCALHOST,
    Server,
    TcpProxy,
    TcpRelay,
    echo,
    exactly,
    free_port,
    wait_for,
)

LIMIT = 64
CLIENTS = 60
HOLD = 3.0
"""Seconds that every other client is silent, longer than a server is unwatched (--stall 4)."""
STALL = ("--stall", "4", "--log-level", "warning")


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(echo) as server:
        yield server


def crowd(port: int, clients: int = CLIENTS) -> Counter[str]:
    """What becomes of so many clients at once; every other one is silent for some time."""
    seen: Counter[str] = Counter()

    def one(number: int) -> None:
        try:
            with socket.create_connection((LOCALHOST, port), timeout=50) as client:
                client.sendall(b"a")
                assert exactly(client, 1) == b"a"
                if number % 2:
                    threading.Event().wait(HOLD)
                    client.sendall(b"b")
                    assert exactly(client, 1) == b"b"
            seen["served"] += 1
        except OSError as error:
            seen[repr(error)] += 1

    threads = [threading.Thread(target=one, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def test_tcp_relay_with_few_descriptors_has_clients_wait(tmp_path: Path, server: Server) -> None:
    root = tmp_path / "tree"
    with TcpRelay(root, *STALL, limit=LIMIT) as relay, FakeKrelay(root, server.endpoint):
        wait_for(lambda: listens(relay.gport), "it to listen")

        assert crowd(relay.gport) == {"served": CLIENTS}
        assert "accepting paused" in relay.log


def test_each_of_several_workers_has_clients_wait(tmp_path: Path, server: Server) -> None:
    few = ("--workers", "2")
    with TcpProxy(tmp_path, LOCALHOST, server.endpoint.port, *STALL, *few, limit=48) as proxy:
        wait_for(lambda: listens(proxy.port), "it to listen")

        assert crowd(proxy.port) == {"served": CLIENTS}


@pytest.mark.parametrize("host", [LOCALHOST, "localhost"])
def test_tcpproxy_with_few_descriptors_has_clients_wait(
    tmp_path: Path, server: Server, host: str
) -> None:
    """Also where names are looked up meanwhile, which takes descriptors, too."""
    with TcpProxy(tmp_path, host, server.endpoint.port, *STALL, limit=LIMIT) as proxy:
        wait_for(lambda: listens(proxy.port), "it to listen")

        assert crowd(proxy.port) == {"served": CLIENTS}
        assert "accepting paused" in proxy.log


def test_what_else_takes_descriptors_has_them_while_no_more_clients_find_room(
    tmp_path: Path, server: Server
) -> None:
    """krelay comes again, the gateway port changes, and all goes on."""
    root = tmp_path / "tree"
    with TcpRelay(root, "--log-level", "info", limit=LIMIT) as relay, ExitStack() as stack:
        krelay = stack.enter_context(FakeKrelay(root, server.endpoint))
        relay.ready()
        clients = [stack.enter_context(relay.dial()) for _ in range(30)]
        relay.wait_for_log("accepting paused")
        served = [client for client in clients if is_served(client)]
        assert 10 <= len(served) < LIMIT / 2
        krelay.stop()
        krelay.start()
        relay.wait_for_log("info connected to krelay")
        other = free_port()
        (root / "gport").write_text(f"{other}\n")
        relay.wait_for_log(f"listening gport={other}")

        assert all(is_served(client, 20) for client in served)
        for client in served:
            client.close()
        with relay.dial(other) as late:
            assert is_served(late, 20)


@pytest.mark.parametrize("command", ["tcp_relay", "tcp_relay.tcpproxy"])
def test_too_few_descriptors_are_refused_in_one_clear_line(tmp_path: Path, command: str) -> None:
    arguments = {
        "tcp_relay": ("--root", str(tmp_path)),
        "tcp_relay.tcpproxy": (LOCALHOST, "1", str(free_port())),
    }[command]
    script = 'ulimit -n 12; exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", sys.executable, "-m", command, *arguments],
        capture_output=True, text=True, timeout=20,
    )  # fmt: skip

    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "12 open files are too few" in line
    assert "ulimit -n" in line


def listens(port: int) -> bool:
    """Whether somebody does."""
    try:
        socket.create_connection((LOCALHOST, port)).close()
    except ConnectionRefusedError:
        return False
    return True


def is_served(client: socket.socket, patience: float = 0.5) -> bool:
    """Whether what it says comes back."""
    client.settimeout(patience)
    client.sendall(b"x")
    try:
        return exactly(client, 1) == b"x"
    except TimeoutError:
        return False
