"""Sets and counters of the rules' own table: queries that the kernel has learnt.

Each call waits for the kernel's answer.  If one fails, or the answer is not what it must be,
another program has changed the table: OffloadLost is raised, and the service makes all anew.
"""

import errno
import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress

from knet import netlink
from knet.endpoint import Proto
from knet.netlink import nftables
from knet.netlink.socket import NetlinkSocket
from knet.sockbuf import Direction, enlarge
from krelay.offload.backend import OffloadLost
from krelay.rules.dnslearning import COUNTERS
from krelay.steps import Step

TIMEOUT = 5.0
"""Seconds: another program's transaction may be under way."""
_BUFFER = 1 << 20
_RECEIVE = 1 << 17
_LOST = (errno.ENOBUFS, errno.EBADF, errno.EAGAIN)
"""Errors after which there is nothing more to read; EAGAIN: not within TIMEOUT."""
_WAITS = struct.pack("@ll", int(TIMEOUT), 0)
"""struct timeval, for SO_RCVTIMEO: the kernel itself keeps the time, while a time-out of Python's
would ask for readiness (poll) before each answer."""


class NftSets:
    """Those of one table.  Raises OSError without privilege."""

    def __init__(self, table: str) -> None:
        self._table = table
        self._socket = _connected()

    @property
    def port(self) -> int:
        """Of this socket: the changes it makes are announced with it."""
        return self._socket.port

    def totals(self) -> dict[tuple[Proto, Step], int]:
        """Packets by step that the rules have rewritten themselves.  Raises OffloadLost."""
        self._send(nftables.get_counters(self._table))
        found = {}
        for message in self._answers(None):
            if message.error:
                raise OffloadLost(os.strerror(message.error))
            named = nftables.named_counter(message)
            if named is not None and (step := COUNTERS.get(named[0])) is not None:
                found[Proto.UDP, step] = named[1].packets
        return found

    def learnt(self, names: Sequence[str], client: bytes, port: bytes) -> str | None:
        """The set of these that has a query from there.  Raises OffloadLost."""
        requests = (
            nftables.get_learnt(self._table, name, client, port, at)
            for at, name in enumerate(names, 1)
        )
        self._send(b"".join(requests))
        found = None
        for message in self._answers(len(names)):
            if message.error not in (None, errno.ENOENT):
                raise OffloadLost(os.strerror(message.error))
            if message.error is None and 1 <= message.sequence <= len(names):
                found = names[message.sequence - 1]
        return found

    def close(self) -> None:
        """Leaves all as it is."""
        self._socket.close()

    def _send(self, data: bytes) -> None:
        """To the kernel; once more if that fails, for a moment without memory changes no map."""
        with suppress(OSError):
            self._socket.send(data)
            return
        try:
            self._socket.send(data)
        except OSError as error:
            raise OffloadLost(str(error)) from None

    def _answers(self, count: int | None) -> Iterator[netlink.Message]:
        """So many messages, or all until the end of a list."""
        heard, failed = 0, False
        give_up = time.monotonic() + TIMEOUT
        while time.monotonic() < give_up:
            try:
                data = self._socket.recv(_RECEIVE)
            except OSError as error:
                if error.errno in _LOST or failed:
                    raise OffloadLost(str(error)) from None
                failed = True  # what was to be read is still there
                continue
            for message in netlink.messages(data):
                if message.subsystem == 0 and message.kind == netlink.DONE:
                    return
                yield message
                heard += 1
                if heard == count:
                    return
        raise OffloadLost("the kernel doesn't answer")


def _connected() -> NetlinkSocket:
    kernel = NetlinkSocket(netlink.FAMILY)
    try:
        kernel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _WAITS)
        for direction in Direction:
            enlarge(kernel, direction, _BUFFER)
    except OSError:
        kernel.close()
        raise
    return kernel
