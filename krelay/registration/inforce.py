"""What has been in force while relaying: what a connection can have begun with.

A connection keeps the gateway port, the server and the source that it began with, also over a
krelay that is killed and started again.  What tcp-relay then says about it is believed only if it
was in force at some time, all of it at once.  So each change is written down, where only krelay
writes; when relaying ends so do all connections, and it is forgotten.

    >>> line = "gport=16000 server=192.168.0.1 source=client tcp=80,8000-8002"
    >>> [then] = InForce.parse(line)
    >>> sorted(then.tcp), then.text() == line
    ([80, 8000, 8001, 8002], True)
"""

import re
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import NamedTuple, Self

from knet.endpoint import Endpoint, Source

MOST = 64
"""Changes that are remembered, the latest."""

_LINE = re.compile(
    r"gport=([0-9]{1,5}) server=([0-9.]{7,15}) source=(client|relay) tcp=([0-9,-]{0,40000})"
)


class InForce(NamedTuple):
    """What connections began with at one time."""

    gport: int
    server: bytes
    source: Source
    tcp: frozenset[int]
    """Ports that tcp-relay served."""

    def allows(self, gport: int, server: Endpoint, source: Source) -> bool:
        """Whether a connection can have begun with these; a client beside the server sees RELAY."""
        return (
            gport == self.gport
            and server.addr == self.server
            and server.port in self.tcp
            and source in (self.source, Source.RELAY)
        )

    def text(self) -> str:
        """A line for a file."""
        server = IPv4Address(self.server)
        return f"gport={self.gport} server={server} source={self.source} tcp={_ranges(self.tcp)}"

    @classmethod
    def parse(cls, text: str) -> list[Self]:
        """Reads the lines of a file; what is none of `text`'s is passed over."""
        found = []
        for line in text.splitlines()[-MOST:]:
            match = _LINE.fullmatch(line)
            if match is None:
                continue
            gport, server, source, ports = match.groups()
            try:
                tcp = frozenset(_ports(ports))
                found.append(cls(int(gport), IPv4Address(server).packed, Source(source), tcp))
            except ValueError:
                continue
        return found


def text(in_force: Iterable[InForce]) -> str:
    """The file that `InForce.parse` reads."""
    return "".join(f"{each.text()}\n" for each in in_force)


def _ranges(ports: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for port in sorted(ports):
        if runs and port == runs[-1][1] + 1:
            runs[-1][1] = port
        else:
            runs.append([port, port])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def _ports(text: str) -> Iterable[int]:
    for run in filter(None, text.split(",")):
        first, _, last = run.partition("-")
        low, high = int(first), int(last or first)
        if not 1 <= low <= high <= 0xFFFF:
            raise ValueError(run)
        yield from range(low, high + 1)
