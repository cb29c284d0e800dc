"""A netlink socket (netlink(7)): opened, bound, asked, and read.

It is a socket like others, so `recv` and `send` are the kernel's own; what all who use netlink need
beside that is here.  No program but the kernel is spoken to.
"""

import errno
import os
import socket
from collections.abc import Iterator

from knet import netlink

SIZE = 1 << 16
"""Bytes of a packet of messages, at most, unless much more is asked for."""


class NetlinkSocket(socket.socket):
    """A socket of one netlink family (`netlink.FAMILY`, `rtnetlink.FAMILY`, `sockdiag.FAMILY`).

    Raises OSError if the kernel has no such family, or gives no access to its groups.
    """

    def __init__(
        self, family: int, *, groups: int = 0, timeout: float | None = None, buffer: int = 0
    ) -> None:
        """`groups`: a bit for each group whose announcements are heard.  `timeout`: seconds that a
        call waits; 0: none does; None: for good.  `buffer`: bytes for what waits to be read."""
        super().__init__(socket.AF_NETLINK, socket.SOCK_RAW, family)
        self.sequence = 0
        """Of the last request made with `next_sequence`."""
        try:
            self.settimeout(timeout)
            if buffer:
                self.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            self.bind((0, groups))
        except OSError:
            self.close()
            raise

    @property
    def port(self) -> int:
        """Its own number: what this socket changes is announced with it."""
        return int(self.getsockname()[0])

    def next_sequence(self) -> int:
        """The number of the next request, by which its answers are known."""
        self.sequence = (self.sequence + 1) & 0xFFFFFFFF
        return self.sequence

    def carry_out(self, requests: bytes, count: int, sequence: int | None = None) -> None:
        """Sends these and waits for their acknowledgements: so many, all with this sequence number,
        or with any.  Other messages are passed over.

        Raises OSError: the kernel's refusal, or TimeoutError.
        """
        self.send(requests)
        while count > 0:
            for message in netlink.messages(self.recv(SIZE)):
                if message.error is None or sequence not in (None, message.sequence):
                    continue
                if message.error:
                    raise OSError(message.error, os.strerror(message.error))
                count -= 1

    def waiting(self) -> Iterator[bytes | None]:
        """Each packet that waits to be read, never waiting for one; None where some were lost for
        want of buffer.  Raises OSError.  Only where the timeout is 0."""
        while True:
            try:
                yield self.recv(SIZE)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                yield None
