"""The phases by name, what is said of each, and the command line: all that needs no socket."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

STALL = 10.0
"""Seconds: the limit that a proxy has unless told otherwise."""
PLACEHOLDERS = ("{host}", "{port}", "{listen}")


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase.  It fails after `seconds` and `stalls` times the stall limit."""

    name: str
    seconds: float
    stalls: float = 0.0
    waits: bool = False  # mostly; it runs at the same time as its neighbours that do
    chained: bool = False  # through two proxies one behind the other

    def patience(self, stall: float) -> float:
        """Seconds that it may take."""
        return self.seconds + self.stalls * stall


PHASES = (
    Phase("Single echo connection", 5),
    Phase("Two echo connections", 10),
    Phase("20 echo connections", 20),
    Phase("Bulk data, 20 connections", 60, chained=True),
    Phase("Mix of blocked and normal", 30),
    Phase("One-way shutdown", 15),
    Phase("Early close", 30),
    Phase("Non-timeout of active client", 20, stalls=2, waits=True),
    Phase("Timeout of lazy forward client", 10, stalls=3, waits=True),
    Phase("Timeout of lazy reverse client", 10, stalls=3, waits=True),
)


def select(prefix: str) -> list[Phase]:
    """The phases whose name begins so, in order, whatever the case.

    >>> [phase.name for phase in select("timeout")]
    ['Timeout of lazy forward client', 'Timeout of lazy reverse client']
    """
    return [phase for phase in PHASES if phase.name.lower().startswith(prefix.lower())]


def groups(phases: Sequence[Phase]) -> list[list[Phase]]:
    """What runs at the same time: neighbours that wait; every other phase has the proxy alone."""
    found: list[list[Phase]] = []
    for phase in phases:
        if found and phase.waits and found[-1][-1].waits:
            found[-1].append(phase)
        else:
            found.append([phase])
    return found


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a phase; `failure` is the reason, if it failed.

    >>> print(Verdict(PHASES[0], 0.04))
    Single echo connection ... passed (0.0 s)
    >>> print(Verdict(PHASES[1], 3, "connection 2: 0 of 10 bytes came within 10 s"))
    Two echo connections ... failed: connection 2: 0 of 10 bytes came within 10 s
    """

    phase: Phase
    seconds: float
    failure: str | None = None

    def __str__(self) -> str:
        outcome = f"failed: {self.failure}" if self.failure else f"passed ({self.seconds:.1f} s)"
        return f"{self.phase.name} ... {outcome}"


def filled(command: Sequence[str], host: str, port: int, listen: int) -> list[str]:
    """The proxy's command line: placeholders filled in, or the three words appended.

    >>> filled(["tcpproxy", "--stall", "2"], "127.0.0.1", 80, 81)
    ['tcpproxy', '--stall', '2', '127.0.0.1', '80', '81']
    >>> filled(["socat", "TCP-LISTEN:{listen},fork", "TCP:{host}:{port}"], "127.0.0.1", 80, 81)
    ['socat', 'TCP-LISTEN:81,fork', 'TCP:127.0.0.1:80']
    """
    values = dict(zip(PLACEHOLDERS, (host, str(port), str(listen)), strict=True))
    if not any(mark in word for word in command for mark in PLACEHOLDERS):
        return [*command, *values.values()]
    words = list(command)
    for mark, value in values.items():
        words = [word.replace(mark, value) for word in words]
    return words


@dataclass(frozen=True, slots=True)
class Options:
    """What was asked for; no `command` means a list of the phases."""

    phases: Sequence[Phase]
    stall: float
    command: Sequence[str]


def parse(arguments: Sequence[str]) -> Options:
    """Reads the command line; ends the program with status 2 and the reason if it can't."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tprox",
        usage="%(prog)s [--stall SECONDS] [--only PHASE-PREFIX] [--list] COMMAND...",
        description="Tests a TCP proxy, started as COMMAND... HOST PORT LISTEN-PORT; or with "
        "{host}, {port} and {listen} in COMMAND filled in, and nothing appended.",
    )
    stall_help = "the stall limit that the proxy has (default %(default)g)"
    parser.add_argument("--stall", type=_limit, default=STALL, metavar="SECONDS", help=stall_help)
    parser.add_argument("--only", default="", metavar="PHASE-PREFIX", help="just these phases")
    parser.add_argument("--list", action="store_true", help="print the names of the phases")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND...")
    found = parser.parse_args(arguments)
    if not (phases := select(found.only)):
        parser.error(f"no phase begins with {found.only!r}")
    if not found.command and not found.list:
        parser.error("no COMMAND")
    return Options(phases, found.stall, () if found.list else found.command)


def _limit(text: str) -> float:
    """A float of 1 or more: pauses of tenths of a second are part of several phases."""
    if not 1 <= (value := float(text)) <= 3600:
        raise argparse.ArgumentTypeError("not between 1 and 3600")
    return value
