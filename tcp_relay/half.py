"""One direction of a relayed connection: bytes from source to sink, then the end of file.

A half knows facts and nothing else: the bytes that are held, whether the source may have some more,
whether the sink may take some, whether the end was read, whether it was passed on.  What is to be
done next (`todo`) follows from the facts, so there is no state to fall out of step with them, and
no mask to toggle: sockets are registered edge-triggered once, an event sets `readable` or
`writable`, and only a call that came back short or empty-handed unsets it.

Why bytes are held at all: a send that takes only part must keep the rest somewhere.  Why up to
LIMIT and not just that rest: whoever is slow for a moment then doesn't stall the faster side.
Beyond it nothing is read, TCP's own window closes, and the source is slowed down to the pace of the
sink, as it would be without a relay.

    >>> half = Half(readable=True, writable=True)
    >>> half.todo(), half.got(b"hello", 65536)
    (<Todo.READ: 1>, None)
    >>> half.todo(), half.sent(5)
    (<Todo.WRITE: 2>, None)
    >>> half.todo()  # five bytes of 65536: the socket was emptied
    <Todo.WAIT: 0>
"""

from dataclasses import dataclass
from enum import IntEnum

LIMIT = 256 * 1024
"""Bytes held per direction at most.

Four reads: enough to ride out a sink that is slow for a moment, with the kernel's own buffers on
both sides.  Not more: 1,000 connections stalled both ways hold 512 MB.
"""

CHUNK = 64 * 1024
"""Bytes per read: above it the copying dominates the cost of the call."""


class Todo(IntEnum):
    """What moves a half on."""

    WAIT = 0  # for an event
    READ = 1  # from the source
    WRITE = 2  # what is held, to the sink
    SHUT = 3  # the sink's sending side: everything before the end of file is through


@dataclass(slots=True)
class Half:
    """Bytes leave in the order they came, the end of file after them, once; `limit` is kept."""

    limit: int = LIMIT
    held: bytes | bytearray = b""
    readable: bool = False  # the source may have bytes, or its end
    hinted: bool = False  # the source's next read may be short without being the last: see `got`
    writable: bool = False  # the sink may take bytes
    got_eof: bool = False
    sent_eof: bool = False
    moved: int = 0  # bytes that the sink took

    @property
    def may_read(self) -> bool:
        """A read from the source makes sense, of `room` bytes at most."""
        return self.readable and not self.got_eof and len(self.held) < self.limit

    @property
    def may_write(self) -> bool:
        """The sink may take some of `held`."""
        return self.writable and len(self.held) > 0

    @property
    def must_shut(self) -> bool:
        """The end of file is to be passed on now."""
        return self.got_eof and not self.held and not self.sent_eof

    @property
    def ended(self) -> bool:
        """Nothing will ever move in this direction again."""
        return self.sent_eof

    @property
    def room(self) -> int:
        """Bytes that one read may ask for."""
        return min(CHUNK, self.limit - len(self.held))

    def todo(self) -> Todo:
        """The next step.  Writing comes first: what is held gets no older than it must."""
        if self.held and self.writable:
            return Todo.WRITE
        if self.may_read:
            return Todo.READ
        if self.must_shut:
            return Todo.SHUT
        return Todo.WAIT

    def got(self, data: bytes, asked: int) -> None:
        """A read of up to `asked` (1 to `room`) bytes gave `data`; b"" is the end of file.

        A short read means that the socket is empty, and whatever arrives later comes with an event
        of its own (epoll(7), "Do I need to continuously read/write").  With two exceptions, which
        events announce: the end of file behind the data (RDHUP), and urgent data, at whose mark
        tcp_recvmsg stops (PRI).  While `hinted`, only an empty-handed read counts.
        """
        if not data:
            self.got_eof = True
            return
        if len(data) < asked and not self.hinted:
            self.readable = False
        if not self.held:
            self.held = data
        elif isinstance(self.held, bytearray):
            self.held += data
        else:
            self.held = bytearray(self.held + data)

    def empty(self) -> None:
        """A read found nothing (EAGAIN)."""
        self.readable = self.hinted = False

    def sent(self, count: int) -> None:
        """The sink took the first `count` bytes of `held`; fewer than all means that it is full."""
        self.moved += count
        if count == len(self.held):
            self.held = b""  # an idle half holds no buffer
            return
        self.writable = False
        if not isinstance(self.held, bytearray):
            self.held = bytearray(self.held)
        del self.held[:count]

    def full(self) -> None:
        """A write found no room (EAGAIN)."""
        self.writable = False

    def shut(self) -> None:
        """The end of file was passed on."""
        self.sent_eof = True
