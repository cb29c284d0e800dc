"""The ways through the relay, and what a run through one is worth beside a run without it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from tests.programs.table import Client, Server

Kind = Literal["terminated", "forwarded", "relayed"]

KINDS: dict[Kind, str] = {"terminated": "tcp", "forwarded": "tcp", "relayed": "udp"}
"""What becomes of a service's packets, and of which protocol they are."""
DATAPATHS = ("queue", "auto")
SOURCES = ("client", "relay")
GUARDED = re.compile(r"tcp/22(?=\D|$)")
"""The service that the relay takes only with an exclamation mark."""


class Way(NamedTuple):
    """One way through the relay."""

    kind: Kind
    datapath: str
    source: str

    def __str__(self) -> str:
        return " ".join(self)


@dataclass(frozen=True, slots=True)
class Run:
    """What became of a client.

    `found` has what was matched for each pattern, blanks as one, None where nothing was; `lost`
    what the program said of losses; `packets` is how many the relay counted in its first step, None
    where there was no relay.
    """

    status: int | None
    seconds: float
    found: tuple[str | None, ...] = ()
    lost: tuple[str, ...] = ()
    packets: int | None = None
    said: str = ""


def ways(datapaths: Iterable[str], sources: Iterable[str]) -> Iterator[Way]:
    """All ways, those of one kind together."""
    pairs = [(datapath, source) for datapath in datapaths for source in sources]
    for kind in KINDS:
        yield from (Way(kind, *pair) for pair in pairs)


def services(server: Server, kind: Kind) -> str:
    """The setting `services` for a server: its TCP is forwarded if `kind` says so.

    >>> services(Server("sshd", ("tcp/22", "tcp/2200", "udp/60001"), ""), "forwarded")
    'tcp/22=forward! tcp/2200=forward udp/60001'
    """
    words = []
    for service in server.services:
        forward = "=forward" if kind == "forwarded" and service.startswith("tcp/") else ""
        words.append(service + forward + "!" * bool(GUARDED.match(service)))
    return " ".join(words)


def port(service: str) -> tuple[str, int]:
    """The protocol and the first port of a service.

    >>> port("tcp/30000-30009"), port("udp/69+any-port")
    (('tcp', 30000), ('udp', 69))
    """
    found = re.match(r"(\w+)/(\d+)", service)
    assert found, service
    return found[1], int(found[2])


def read(client: Client, to: str, status: int, seconds: float, output: str) -> Run:
    """What a client's output shows; the address it asked is written `TO`."""
    output = re.sub(rf"(?<![\d.]){re.escape(to)}(?![\d.]*\d)", "TO", output.replace("\r", ""))

    def search(pattern: str) -> str | None:
        match = re.search(pattern.replace("$TO", "TO"), output, re.MULTILINE)
        return " ".join(match.group().split()) if match else None

    return Run(
        status,
        seconds,
        found=tuple(map(search, client.shows)),
        lost=tuple(filter(None, map(search, client.hides))),
        said=output,
    )


def wrong(client: Client, run: Run) -> str | None:
    """Why a run is no success by itself, or None."""
    if run.status is None:
        return f"no end within {client.seconds:g} s"
    missing = [shown for shown, found in zip(client.shows, run.found, strict=True) if found is None]
    if missing:
        return f"status {run.status}, and no match for {missing[0]}"
    if run.lost:
        return run.lost[0]
    return None


def unlike(client: Client, direct: Run, run: Run) -> str | None:
    """Why a run through the relay isn't as good as the one without it, or None."""
    if reason := wrong(client, run):
        return reason
    if run.status != direct.status:
        return f"status {run.status} instead of {direct.status}"
    for there, here in zip(direct.found, run.found, strict=True):
        if there != here:
            return f"{here!r} instead of {there!r}"
    return None if run.packets else "no packet of it went through the relay"


def slower(direct: Run, runs: Mapping[Way, Run]) -> str | None:
    """By how much, if the slowest run took more than twice as long and a second more."""
    slowest = max(runs, key=lambda way: runs[way].seconds, default=None)
    if slowest is None or runs[slowest].seconds <= 2 * direct.seconds + 1:
        return None
    return f"{slowest}: {runs[slowest].seconds:.1f} s, directly {direct.seconds:.1f} s"
