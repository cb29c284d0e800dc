"""After thousands of conversations everything is as it was before: flows, descriptors, memory.

KRELAY_LONG=1 has twice as many.
"""

import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from krelay.daemon.daemon import NICENESS
from krelay_vm import Program
from tests.net.world import PYTHON, World, greet

pytestmark = pytest.mark.net

LONG = bool(os.environ.get("KRELAY_LONG"))
CONNECTIONS = QUERIES = 2000 if LONG else 1000
GROWTH = (4 if LONG else 2) << 20
"""Bytes that a process may have more after the second thousands than after the first."""
PAGE = os.sysconf("SC_PAGE_SIZE")
QUERY = bytes.fromhex("12340100000100000000000003777777076578616d706c650000010001")
"""www.example A (RFC 1035, section 4)."""


SETTLED = 0.05
"""Seconds for which descriptors must stay the same: krelay closes what was its peers' apart."""


def descriptors(program: Program) -> list[str]:
    """What a process has open, by kind, once that stays the same for a moment."""
    directory = Path(f"/proc/{program.pid}/fd")
    before: list[str] | None = None
    for _ in range(100):
        found = []
        for entry in directory.iterdir():
            with suppress(FileNotFoundError):  # closed since
                found.append(os.readlink(entry))
        if found == before:
            return sorted(each.partition(":")[0] for each in found)
        before = found
        time.sleep(SETTLED)
    raise AssertionError(f"descriptors come and go all the time: {before}")


def memory(program: Program) -> int:
    """Resident bytes (proc(5), statm)."""
    return int(Path(f"/proc/{program.pid}/statm").read_text().split()[1]) * PAGE


def baseline(
    world: World, programs: tuple[Program, ...], *, refused: bool = False
) -> list[list[str]]:
    """What they have open once a first connection has come and gone."""
    if refused:
        with pytest.raises(ConnectionResetError), world.connect("client", 80) as sock:
            sock.recv(1)
    else:
        world.who("client", 80)
    world.until(lambda: world.flows("state=closed"), "its end")
    return [descriptors(program) for program in programs]


def talk(world: World) -> None:
    """So many connections and so many queries, each from a new port."""

    def connect(number: int) -> None:
        with world.lab.enter("client"), socket.socket() as sock:
            sock.settimeout(10)
            sock.connect((world.relay, 80))
            assert greet(sock).startswith(f"{world.client}:")
            if number % 10 == 0:  # some end in a reset
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def query(number: int) -> None:
        with world.lab.enter("client2"), socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.settimeout(10)
            sock.bind(("", 10_000 + number))
            sock.connect((world.relay, 53))
            sock.send(number.to_bytes(2) + QUERY[2:])
            assert sock.recv(512)[:2] == number.to_bytes(2)

    with ThreadPoolExecutor(8) as some:
        list(some.map(connect, range(CONNECTIONS)))
        list(some.map(query, range(QUERIES)))


def test_after_thousands_of_conversations_nothing_is_left_of_them(world: World) -> None:
    world.serve("server", "tcp/80")
    world.dnsmasq("server", 53, {"www.example": "10.9.8.7"})
    world.begin()
    world.put(timeouts__udp_dns=2, timeouts__tcp_transitory=2)
    world.put(limits__flows_per_client=CONNECTIONS + QUERIES)
    programs = (world.krelay_process, world.tcp_relay_process)
    opened = baseline(world, programs)

    def settled() -> bool:
        if world.values("status")["flows"]:  # costs little, thousands of rows do
            return False
        left = world.flows() or world.handed()
        return not left and [descriptors(program) for program in programs] == opened

    talk(world)
    world.until(settled, "no rows and flows, and as many descriptors as before")
    warm = [memory(program) for program in programs]
    talk(world)
    world.soon(lambda: world.values("counters")["U1"] >= 2 * QUERIES, "all counted")
    world.until(settled, "the same again")

    grown = [memory(program) - before for program, before in zip(programs, warm, strict=True)]
    assert max(grown) < GROWTH, grown
    status = world.values("status")
    assert (status["flows"], status["queue_waiting"]) == (0, 0)
    sockets = world.lab.run("relay", "ss", "-Htan", "state", "established").stdout
    assert sockets == ""


def test_connections_that_are_refused_leave_nothing_either(world: World) -> None:
    world.begin()
    world.put(timeouts__udp=1, timeouts__tcp_transitory=1)
    programs = (world.krelay_process, world.tcp_relay_process)
    opened = baseline(world, programs, refused=True)
    for _ in range(200):
        with pytest.raises(ConnectionResetError), world.connect("client", 80) as sock:
            sock.recv(1)
    world.until(lambda: not world.flows(), "no rows")

    assert [descriptors(program) for program in programs] == opened


@pytest.mark.one_datapath("no packet is looked at")
def test_the_daemon_competes_for_cores_as_was_wished(world: World) -> None:
    """Whose niceness somebody has chosen keeps it."""
    ours = os.getpriority(os.PRIO_PROCESS, 0)
    program = world.start_krelay()
    assert os.getpriority(os.PRIO_PROCESS, program.pid) == (ours or NICENESS)
    other = world.lab.directory / "other"
    command = ("nice", "-n", "3", *PYTHON, "-m", "krelay", "daemon", "--root", str(other))
    nice = world.lab.start("relay", *command, "--queue-num", "1700")
    world.until(lambda: world.answers(other), "an answer")
    assert os.getpriority(os.PRIO_PROCESS, nice.pid) == ours + 3
