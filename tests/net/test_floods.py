"""Floods from forged addresses: what they cost, and that running flows don't notice.

A download and 50 queries a second, each from a new port, go on while a flood comes from another
host of the clients' network.  Nothing of theirs may fail: the download arrives as it was sent, each
query is answered; one that is lost is asked again after a second, as resolvers do, and that is
counted.  Small here; KRELAY_LONG=1 is as large as it is meant to hold.
"""

import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from krelay_vm import Program
from tests.net.programs import flood
from tests.net.test_resources import memory
from tests.net.world import PYTHON, World

pytestmark = [pytest.mark.net, pytest.mark.slow]

LONG = bool(os.environ.get("KRELAY_LONG"))
DOWNLOAD = (100 if LONG else 20) << 20
SYNS = 100_000 if LONG else 20_000
DATAGRAMS = 50_000 if LONG else 15_000
FRAGMENTS = 500_000 if LONG else 15_000
RATES = (0, 10_000) if LONG else (0,)
"""Packets a second; 0: as fast as it goes."""
FORGED = "10.128.0.0/9"
TICKS = os.sysconf("SC_CLK_TCK")


class Questions:
    """50 a second, each from a new port, asked up to three times."""

    def __init__(self, world: World) -> None:
        self.answered = self.asked_again = 0
        self.failed: list[str] = []
        self.slowest = 0.0
        self._world = world
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._askers: list[threading.Thread] = []

    def __enter__(self) -> "Questions":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        began, number = time.monotonic(), 0
        with self._world.lab.enter("client"):
            while not self._over.is_set():
                sock = socket.socket(type=socket.SOCK_DGRAM)
                asker = threading.Thread(target=self._ask, args=(sock, number))
                asker.start()
                self._askers.append(asker)
                number += 1
                time.sleep(max(0.0, began + number / 50 - time.monotonic()))
        for asker in self._askers:
            asker.join()

    def _ask(self, sock: socket.socket, number: int) -> None:
        text = b"question %d" % number
        began = time.monotonic()
        with sock:
            sock.settimeout(5)
            sock.connect((self._world.relay, 53))
            error = ""
            for _ in range(3):
                try:
                    sock.send(text)
                    while sock.recv(100) != text:
                        pass  # late, to a query from this port before
                except OSError as problem:
                    error = str(problem)
                    self.asked_again += 1
                else:
                    self.answered += 1
                    self.slowest = max(self.slowest, time.monotonic() - began)
                    return
        self.failed.append(error)


def seconds_of_cpu(program: Program) -> float:
    """What a process has used (proc(5), stat)."""
    fields = Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@pytest.fixture
def flooded(world: World) -> World:
    """Relaying; what is sent to forged addresses ends at client2."""
    world.serve("server", "tcp/80", "udp/53")
    way = world.lab.address("client2")
    world.lab.run("relay", "ip", "route", "add", FORGED, "via", way)
    world.lab.run("relay", "sysctl", "-qw", "net.ipv4.conf.all.rp_filter=0")
    world.begin()
    return world


@contextmanager
def running(world: World) -> Iterator[Questions]:
    """Meanwhile the download and the queries, which must all end well."""
    seconds = 12 if LONG else 4
    download = world.download("client", 80, 3, DOWNLOAD, rate=DOWNLOAD // seconds)
    with Questions(world) as queries:
        world.until(lambda: download.received and queries.answered > 20, "both running")
        yield queries
        download.finish(120)
    assert queries.failed == []


def flood_with(world: World, kind: str, port: int, count: int, rate: int, clients: int) -> str:
    """Sends a flood from client2; what it says of itself."""
    command = (*PYTHON, flood.__file__, kind, world.relay, str(port), str(count), str(rate))
    return world.lab.run("client2", *command, str(clients), timeout=120).stdout.strip()


def figures(world: World, flood: str, before: dict[str, Any], queries: Questions) -> None:
    """Prints what it came to."""
    after = {**world.values("counters"), **world.values("status")}
    program = world.krelay_process
    changed = {
        name: after[name] - before.get(name, 0)
        for name in after
        if isinstance(after[name], int)
        and after[name] != before.get(name, 0)
        and name.startswith(("dropped", "queue_", "socket_", "ended", "passed", "flows", "U1"))
    }
    print(
        f"\n    flood of {flood.replace(' ', ' packets in ')} s: {changed}"
        f"\n    memory {before['memory'] >> 20} to {memory(program) >> 20} MB, "
        f"{seconds_of_cpu(program) - before['cpu']:.1f} s of CPU in "
        f"{time.monotonic() - before['time']:.1f} s"
        f"\n    questions: {queries.answered} answered, {queries.asked_again} asked again, "
        f"slowest {queries.slowest:.2f} s",
        end="",
    )


def fragments_held(world: World) -> int:
    """Bytes that the relay host's kernel holds of datagrams that aren't whole (proc(5))."""
    shown = world.lab.run("relay", "cat", "/proc/net/sockstat").stdout
    found = re.search(r"FRAG: inuse \d+ memory (\d+)", shown)
    assert found
    return int(found[1])


def now(world: World) -> dict[str, Any]:
    """Counters and the rest before a flood."""
    program = world.krelay_process
    return {
        **world.values("counters"),
        **world.values("status"),
        "memory": memory(program),
        "cpu": seconds_of_cpu(program),
        "time": time.monotonic(),
    }


@pytest.mark.parametrize(
    ("kind", "port", "count", "clients"),
    [
        ("syn", 80, SYNS, SYNS),
        ("udp", 53, DATAGRAMS, 1),
        ("udp", 53, DATAGRAMS, DATAGRAMS),
    ],
    ids=["syns", "udp-one-address", "udp-many-addresses"],
)
@pytest.mark.parametrize("rate", RATES)
def test_a_flood_does_not_disturb_what_runs(
    flooded: World, kind: str, port: int, count: int, clients: int, rate: int
) -> None:
    with running(flooded) as queries:
        before = now(flooded)
        said = flood_with(flooded, kind, port, count, rate, clients)
        figures(flooded, said, before, queries)
    figures(flooded, said, before, queries)
    assert flooded.who("client", 80).startswith(f"{flooded.client}:")
    assert flooded.values("status")["flows"] <= 65536
    assert flooded.values("counters")["errors"] == 0


@pytest.mark.parametrize("rate", RATES)
def test_a_flood_of_fragments_takes_bounded_room_and_no_flows(flooded: World, rate: int) -> None:
    """None visits the queue; what the kernel holds of them is what it is told to hold at most."""
    bound = int(flooded.lab.run("relay", "sysctl", "-n", "net.ipv4.ipfrag_high_thresh").stdout)
    with running(flooded) as queries:
        before = now(flooded)
        said = flood_with(flooded, "fragments", 53, FRAGMENTS, rate, FRAGMENTS)
        held = fragments_held(flooded)
        figures(flooded, said, before, queries)
    figures(flooded, said, before, queries)
    print(f"\n    the kernel held {held >> 10} KB of fragments, at most {bound >> 10}", end="")
    assert bound // 2 < held < bound + (64 << 10)
    assert flooded.values("status")["flows"] <= 1 + queries.answered
    assert "passed_fragment" not in flooded.values("counters")
    assert flooded.values("counters")["errors"] == 0
