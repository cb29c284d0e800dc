"""Daemons that stand still for a while (SIGSTOP, `docker pause`, a debugger) and then go on.

Their peers were well meanwhile; nobody is reset for a silence that was the relay's own.
"""

import hashlib
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.net.programs.server import digest
from tests.net.world import GPORT, SERVICES, World, greet

pytestmark = pytest.mark.net

LIMIT = 3.0
"""Seconds that tcp-relay waits for a peer."""
STOP = 5.0
"""Seconds for which they stand still."""
SIZE, SEED = 30 << 20, 7


@pytest.fixture(autouse=True)
def relaying(world: World) -> None:
    """Limits that are shorter than the stop."""
    world.serve("server", "tcp/80", "udp/7")
    world.start_krelay()
    world.put(gport=GPORT, services=SERVICES, real_ip=world.server)
    world.put(timeouts__udp=2, timeouts__tcp_transitory=2, timeouts__tcp_established=3)
    world.start_tcp_relay("--stall", f"{LIMIT:g}", "--connect", f"{LIMIT:g}")
    world.put(start=1)
    world.until_state("running")


@contextmanager
def stopped(world: World) -> Iterator[None]:
    """Both daemons stand still, for STOP seconds at least."""
    daemons = (world.krelay_process, world.tcp_relay_process)
    for daemon in daemons:
        daemon.signal(signal.SIGSTOP)
    began = time.monotonic()
    try:
        yield
        time.sleep(max(0.0, began + STOP - time.monotonic()))
    finally:
        for daemon in daemons:
            daemon.signal(signal.SIGCONT)


def test_a_transfer_that_goes_slowly_outlives_it(world: World) -> None:
    """The server sends without a pause, and the client takes what it can."""
    with world.connect("client", 80) as sock:
        sock.sendall(f"download {SEED} {SIZE} 0\n".encode())
        got, count = hashlib.sha256(), 0

        def read(seconds: float) -> None:
            nonlocal count
            until = time.monotonic() + seconds
            while time.monotonic() < until and (block := sock.recv(1 << 16)):
                got.update(block)
                count += len(block)
                time.sleep(0.02)

        read(1)
        with stopped(world):
            pass
        read(60)
    assert (count, got.hexdigest()) == (SIZE, digest(SEED, SIZE))


def test_a_connection_that_rests_outlives_it(world: World) -> None:
    with world.connect("client", 80) as sock:
        greet(sock)
        flow = world.flows()[0]
        with stopped(world):
            pass
        assert world.flows()[0]["id"] == flow["id"]
        sock.sendall(b"still there")
        assert sock.recv(100) == b"still there"


def test_a_connection_that_is_being_made_is_made(world: World) -> None:
    drop = "table ip deaf { chain in { type filter hook input priority 0; tcp dport 80 drop; }; }"
    world.lab.run("server", "nft", drop)
    with world.connect("client", 80) as sock:
        world.until(lambda: world.flows("proto=tcp"), "a row")
        time.sleep(0.5)
        with stopped(world):
            world.lab.run("server", "nft", "delete table ip deaf")
        assert greet(sock).startswith(f"{world.client}:")


def test_a_datagrams_answer_that_waited_is_relayed(world: World) -> None:
    with world.open("client", socket.SOCK_DGRAM) as sock:
        world.exchange(sock, b"one", (world.relay, 7))
        with stopped(world):
            sock.sendto(b"two", (world.relay, 7))
        assert sock.recvfrom(100) == (b"two", (world.relay, 7))


def test_the_log_says_for_how_long_they_stood_still(world: World) -> None:
    with stopped(world):
        pass
    world.until(lambda: "stood still" in world.krelay_process.output, "krelay's word")
