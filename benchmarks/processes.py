"""What programs have used so far, their children included: processor time and memory.  And cores.

A lab starts every program in a session of its own, so a program's processes are those of its
session.  Children that have ended and were waited for count with their parent.

The kernel books the work that it does for packets, in soft interrupts, on whichever process it
interrupts: mostly the one that sends, as veth hands packets on within the sender's call.  So a
relay's time holds most of the kernel's work of its own sending and acknowledging, and part of its
neighbours' is there too.  That can't be told apart, and is the same for all; but see alone.py.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from krelay_vm import Program

_TICK = 1 / os.sysconf("SC_CLK_TCK")
_KIB = 1024


class Stat(NamedTuple):
    """What proc_pid_stat(5) says of a process."""

    session: int
    seconds: float
    """In user and kernel mode, and its children's that were waited for."""


class Core(NamedTuple):
    """Seconds of a core, or of all together, since the machine was started."""

    idle: float
    """Also what it waited for input and output, and what a hypervisor gave to others."""
    busy: float


class Memory(NamedTuple):
    """Bytes.  `rss` counts what processes share once for each, `pss` just once."""

    rss: int
    pss: int


def parse_stat(text: str) -> Stat:
    """Reads a line of /proc/PID/stat; the name, in brackets, may contain anything."""
    fields = text.rpartition(")")[2].split()  # from the 3rd on
    return Stat(int(fields[3]), sum(map(int, fields[11:15])) * _TICK)


def parse_rollup(text: str) -> Memory:
    """Reads /proc/PID/smaps_rollup."""
    sizes = {
        name: int(rest.split()[0]) * _KIB
        for name, _, rest in (line.partition(":") for line in text.splitlines()[1:])
    }
    return Memory(sizes["Rss"], sizes["Pss"])


def parse_cores(text: str) -> dict[str, Core]:
    """Reads /proc/stat: `cpu`, which is all cores, and `cpu0` and so on (proc_stat(5))."""
    found = {}
    for name, *rest in (line.split() for line in text.splitlines() if line.startswith("cpu")):
        times = [int(number) * _TICK for number in rest[:8]]  # guests' time is in users' already
        idle = sum(times[n] for n in (3, 4, 7))
        found[name] = Core(idle, sum(times) - idle)
    return found


def cores() -> dict[str, Core]:
    """What each core has done so far."""
    return parse_cores(Path("/proc/stat").read_text())


def cpu_seconds(programs: Iterable[Program]) -> float:
    """Seconds of processor time that these have used; exact to a tick (10 ms) a process."""
    return sum(stat.seconds for _, stat in _processes(programs))


def memory(programs: Iterable[Program]) -> Memory:
    """The memory of these."""
    each = [parse_rollup((path / "smaps_rollup").read_text()) for path, _ in _processes(programs)]
    return Memory(sum(one.rss for one in each), sum(one.pss for one in each))


def threads(programs: Iterable[Program]) -> list[int]:
    """The ids of all threads of these and of their children."""
    found: list[int] = []
    for path, _ in _processes(programs):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            found += [int(thread.name) for thread in (path / "task").iterdir()]
    return found


def _processes(programs: Iterable[Program]) -> Iterator[tuple[Path, Stat]]:
    sessions = {program.pid for program in programs}
    for path in Path("/proc").iterdir() if sessions else ():
        if path.name.isdigit():
            try:
                stat = parse_stat((path / "stat").read_text())
            except (FileNotFoundError, ProcessLookupError):  # it has just ended
                continue
            if stat.session in sessions:
                yield path, stat
