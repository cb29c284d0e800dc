"""Who listens on a TCP port of this network namespace: for checking a gateway port."""

import os
from collections.abc import Iterable
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

from knet.socketdiag import SocketDiag

_LISTEN = "0A"
_TABLES = ("/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6")


def listening(port: int) -> frozenset[int]:
    """The inodes of the sockets that listen on this port; empty if none does.

    Asked of the kernel by sock_diag, in microseconds.  /proc/net/tcp, where a kernel has no
    sock_diag, walks all connections of the host: some milliseconds on a large machine.
    """
    try:
        with closing(SocketDiag()) as diag:
            found = diag.listeners(port)
    except OSError:
        found = None
    return _in_tables(port) if found is None else frozenset(each.inode for each in found)


def _in_tables(port: int) -> frozenset[int]:
    inodes = set()
    for table in _TABLES:
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(int(fields[9]))
    return frozenset(inodes)


def holds_any(pid: int, inodes: Iterable[int]) -> bool | None:
    """Whether this process has one of these sockets open; None if it can't be looked at."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    directory = f"/proc/{pid}/fd"
    try:
        names = os.listdir(directory)
    except OSError:
        return None
    for name in names:
        with suppress(OSError):
            if os.readlink(f"{directory}/{name}") in wanted:
                return True
    return False


class Holder(NamedTuple):
    """A process that has a socket open."""

    pid: int
    name: str

    def __str__(self) -> str:
        return f"{self.name} (pid {self.pid})"


def holder(inodes: Iterable[int]) -> Holder | None:
    """A process that has one of these sockets open; None if none can be seen."""
    wanted = frozenset(inodes)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and holds_any(int(entry.name), wanted):
            with suppress(OSError):
                return Holder(int(entry.name), (entry / "comm").read_text().strip())
    return None
