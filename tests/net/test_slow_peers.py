"""Slow isn't dead: who reads slowly, and who reads nothing.

With KRELAY_LONG=1 the slow ones are those of real life, for a minute each.
"""

import hashlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import NamedTuple

import pytest

from tests.net.conftest import DATAPATHS
from tests.net.programs.server import blob, digest
from tests.net.world import GPORT, World, greet

pytestmark = pytest.mark.net

LONG = bool(os.environ.get("KRELAY_LONG"))
RATES, SECONDS = ((20, 100, 300, 500), 60) if LONG else ((60, 80), 25)
"""kB a second, and for how long."""
STALL = 300 if LONG else 3
"""Longer than a window stays closed, shorter than our kernel has no room."""
BUFFERS = ("net.ipv4.tcp_rmem=4096 131072 262144", "net.ipv4.tcp_wmem=4096 65536 1048576")
"""Small ones, so that there is something to wait for within seconds."""
DEAD = 30.0
SEED, KB = 7, 1000
FULL = 16 << 20
"""More than all buffers on the way hold."""


def begin(world: World, *hosts: str) -> None:
    """Relaying between hosts of small buffers; the limit comes from the tree."""
    if not LONG:
        for host in ("relay", *hosts):
            world.run(host, "sysctl", "-w", *BUFFERS)
    for host in hosts:
        if host.startswith("server"):
            world.serve(host, "tcp/80")
    world.start_krelay()
    world.put(gport=GPORT, services="tcp/80", real_ip=world.server, timeouts__stall=STALL)
    world.start_tcp_relay()
    world.put(start=1)
    world.until_state("running")


@pytest.fixture
def relaying(world: World) -> World:
    begin(world, "client", "server")
    return world


class Task(threading.Thread):
    """A client of its own."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._work, self.error = work, ""
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except (OSError, AssertionError) as error:
            self.error = f"{type(error).__name__}: {error}"

    @property
    def outcome(self) -> str:
        """Nothing, if all went well."""
        return "it goes on" if self.is_alive() else self.error


def reads_slowly(sock: socket.socket, rate: int) -> None:
    size = rate * SECONDS
    sock.settimeout(SECONDS)
    sock.sendall(f"download {SEED} {size} 0\n".encode())
    sha, got = hashlib.sha256(), 0
    while block := sock.recv(rate // 10):
        sha.update(block)
        got += len(block)
        time.sleep(0.1)
    assert (got, sha.hexdigest()) == (size, digest(SEED, size))


def is_read_slowly(sock: socket.socket, rate: int) -> None:
    size = rate * SECONDS
    sock.settimeout(SECONDS * 2)
    sock.sendall(f"sip {rate}\n".encode())
    for block in blob(SEED, size):
        sock.sendall(block)
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1000).decode() == f"{size} {digest(SEED, size)}\n"


class Slow(NamedTuple):
    """What came of clients and servers that are slow."""

    errors: list[str]
    log: str


@pytest.fixture(scope="module")
def slow() -> Iterator[dict[str, Slow]]:
    """By data path: both at the same time, for they wait for almost all of it."""
    with ExitStack() as stack:
        worlds = [stack.enter_context(World(datapath=each)) for each in DATAPATHS]
        for world in worlds:
            begin(world, "client", "server")
        tasks = [transfers(world) for world in worlds]
        for task in (each for some in tasks for each in some):
            task.join(SECONDS * 3)
        yield {
            world.datapath: Slow([task.outcome for task in some], world.tcp_relay_process.output)
            for world, some in zip(worlds, tasks, strict=True)
        }


def transfers(world: World) -> list[Task]:
    """At each rate, a client that reads slowly and one whose server does."""
    return [
        Task(lambda work=work, rate=rate: work(world.connect("client", 80), rate * KB))  # type: ignore[misc]
        for work in (reads_slowly, is_read_slowly)
        for rate in RATES
    ]


def test_who_is_slow_gets_all_on_either_side(slow: dict[str, Slow], datapath: str) -> None:
    assert slow[datapath].errors == [""] * 2 * len(RATES)
    assert "reason=stalled" not in slow[datapath].log


def flooding(sock: socket.socket) -> Task:
    """Says all that a server that takes nothing is sent."""

    def flood() -> None:
        sock.settimeout(DEAD * 2)
        for block in blob(SEED, FULL):
            sock.sendall(block)

    return Task(flood)


def lasted(world: World, since: float, bound: float) -> float:
    """Seconds until tcp-relay says that a connection has ended."""
    world.until(lambda: "connection ended" in world.tcp_relay_process.output, "an end", bound)
    return time.monotonic() - since


def held(world: World) -> bool:
    """Whether tcp-relay holds bytes, as it tells krelay every second."""
    return bool(world.values("status")["tcp_held"])


@pytest.mark.parametrize("side", ["client", "server"])
def test_who_answers_and_takes_nothing_is_reset_at_the_limit(relaying: World, side: str) -> None:
    relaying.put(timeouts__stall=4)
    with relaying.connect("client", 80) as sock:
        began = time.monotonic()
        if side == "client":
            sock.sendall(f"download {SEED} {FULL} 0\n".encode())
        else:
            sock.sendall(b"sip 0\n")
            flooding(sock)
        assert 4 <= lasted(relaying, began, 4 + 5) < 4 + 5
    ended = f'reason=stalled detail="the {side} took none of '
    assert ended in relaying.tcp_relay_process.output


def test_the_limit_holds_for_those_who_are_stalled_already(relaying: World) -> None:
    relaying.put(timeouts__stall=3600)
    with relaying.connect("client", 80) as sock:
        sock.sendall(f"download {SEED} {FULL} 0\n".encode())
        relaying.until(lambda: held(relaying), "bytes that are held")
        began = time.monotonic()
        relaying.put(timeouts__stall=1)
        lasted(relaying, began, 1 + 5)


def test_an_option_goes_before_the_file(relaying: World) -> None:
    relaying.tcp_relay_process.terminate()
    relaying.tcp_relay_process.wait()
    relaying.start_tcp_relay("--stall", "1")
    with relaying.connect("client", 80) as sock:
        assert greet(sock)
        sock.sendall(b"x")
    with relaying.connect("client", 80) as sock:
        sock.sendall(f"download {SEED} {FULL} 0\n".encode())
        relaying.until(
            lambda: "took none of" in relaying.tcp_relay_process.output, "the end of a stall", 1 + 5
        )
