"""Asks the kernel whose TCP sockets are which: who listens on a port, whose a connection is.

The answer is the kernel's own, of one system call or two; no process is looked at.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import starmap

from knet.endpoint import Endpoint
from knet.netlink import sockdiag
from knet.netlink.socket import NetlinkSocket

BUFFER = 1 << 16


class SocketDiag:
    """A socket to ask by, in hand from the start.  Raises OSError if the kernel gives none."""

    def __init__(self) -> None:
        # What is asked is answered before `send` returns.
        self._socket = NetlinkSocket(sockdiag.FAMILY, timeout=0)
        self._buffer = memoryview(bytearray(BUFFER))

    def close(self) -> None:
        """Asks nothing more."""
        self._socket.close()

    def listeners(self, port: int) -> list[sockdiag.Socket] | None:
        """All sockets that listen on this TCP port; None if the kernel doesn't tell."""
        found = []
        for family in (sockdiag.IPV4, sockdiag.IPV6):
            try:
                for each in self._ask(sockdiag.listeners_on(port, family), is_list=True):
                    if each.port == port and each.state == sockdiag.LISTEN:
                        found.append(each)
            except OSError:
                if family == sockdiag.IPV4:
                    return None  # an IPv4 kernel tells of no IPv6 sockets, and has none
        return found

    def carrier(self, local: Endpoint, remote: Endpoint, may_open: bool = False) -> int | None:
        """The uid of the process that accepted or made this connection; None if no process has.

        With `may_open` also one that was begun here and isn't answered yet.

        Raises OSError if the kernel doesn't tell.
        """
        try:
            for each in self._ask(sockdiag.connection_between(local, remote), is_list=False):
                opens = may_open and each.state == sockdiag.SYN_SENT
                return each.uid if opens or each.state in sockdiag.CARRYING else None
        except FileNotFoundError:
            if self.listeners(local.port) is None:
                raise  # not the connection is unknown, but the request
        return None

    def carriers(self, ends: Sequence[tuple[Endpoint, Endpoint]]) -> list[int | None]:
        """As `carrier`, of many at once; None also where the kernel doesn't tell."""
        found: list[int | None] = []
        with suppress(OSError):
            self._drain()
            self._socket.sendto(b"".join(starmap(sockdiag.connection_between, ends)), (0, 0))
            for _ in ends:
                found.append(sockdiag.carried_by(self._receive()))
        return found + [None] * (len(ends) - len(found))

    def _drain(self) -> None:
        """Forgets the answers to a request that was given up."""
        with suppress(BlockingIOError):
            while self._receive():
                pass

    def _ask(self, request: bytes, *, is_list: bool) -> Iterator[sockdiag.Socket]:
        self._drain()
        self._socket.sendto(request, (0, 0))
        while True:
            try:
                data = self._receive()
            except BlockingIOError:
                return
            for each in sockdiag.sockets(data):
                if each is None:
                    return
                if isinstance(each, int):
                    if each:
                        raise OSError(each, errno.errorcode.get(each, "error"))
                    return
                yield each
            if not is_list:
                return

    def _receive(self) -> bytes:
        """A packet of answers.  Into one buffer: one each would scatter what else is in memory."""
        return self._buffer[: self._socket.recv_into(self._buffer)].tobytes()
