"""One direction of a relayed connection: bytes from source to sink, then the end of file.

A channel knows facts and nothing else: the bytes that are held, whether the source may have some
more, whether the sink may take some, whether the end was read, whether it was passed on.  What is
to be done next (`todo`) follows from the facts, so there is no state to fall out of step with them,
and no mask to toggle: sockets are registered edge-triggered once, an event sets `readable` or
`writable`, and only a call that came back short or empty-handed unsets it.

Bytes go from a read straight into a write.  Only what the sink doesn't take is held, and until it
is gone nothing more is read: so what is held is never more than one read, a slow sink closes the
window of its source as it would without a relay, and a channel that keeps up holds nothing at all.

    >>> channel = Channel(readable=True, writable=True)
    >>> channel.todo(), channel.got(5, 65536, now=1.0), channel.sent(5, now=1.0)
    (<Todo.READ: 1>, None, None)
    >>> channel.todo()  # five bytes of 65536: the socket was emptied
    <Todo.WAIT: 0>
"""

from dataclasses import dataclass
from enum import IntEnum

NOTHING = memoryview(b"")


class Todo(IntEnum):
    """What moves a channel on."""

    WAIT = 0  # for an event
    READ = 1  # from the source, and write it to the sink
    WRITE = 2  # what is held, to the sink
    SHUT = 3  # the sink's sending side: everything before the end of file is through
    RESET = 4  # the sink: everything before the source's reset is through


WAIT, READ, WRITE, SHUT, RESET = Todo
# By these names: looking one up in its class takes ten times as long.


@dataclass(slots=True)
class Channel:
    """Bytes leave in the order they came; the end of file, or the reset, after them, once."""

    held: memoryview = NOTHING  # an idle channel holds no buffer
    readable: bool = False  # the source may have bytes, or its end
    hinted: bool = False  # the source's next read may be short without being the last: see `got`
    ending: bool = False  # the end of file is there, maybe behind some bytes, none of them urgent
    urgent: bool = False  # the source has an urgent byte (RFC 6093), perhaps behind others
    held_urgent: bool = False  # what is held is one
    writable: bool = False  # the sink may take bytes
    got_eof: bool = False
    got_reset: bool = False  # instead of an end of file, or after it
    sent_eof: bool = False
    sink_gone: bool = False  # what is read is thrown away
    moved: int = 0  # bytes that the sink took
    at: float = 0.0  # when bytes, or the end of file, last moved in or out
    acked: int | None = None  # bytes that the sink's peer had acknowledged when last asked
    is_hastened: bool = False  # the sink's kernel asks its peer often, now that it is waited for

    def todo(self) -> Todo:
        """The next step."""
        if self.sink_gone:
            return READ if self.readable and not self.got_eof else WAIT
        if self.held:
            return WRITE if self.writable else WAIT
        if self.got_reset:
            return RESET
        if self.got_eof:
            return WAIT if self.sent_eof else SHUT
        return READ if self.readable and self.writable else WAIT

    @property
    def is_smooth(self) -> bool:
        """Whatever comes may go straight through."""
        return self.writable and not (self.held or self.got_eof or self.hinted or self.sink_gone)

    def got(self, count: int, asked: int, now: float) -> None:
        """A read of up to `asked` bytes gave `count`; 0 is the end of file.

        A short read means that the socket is empty, and whatever arrives later comes with an event
        of its own (epoll(7), "Do I need to continuously read/write").  With two exceptions, which
        events announce: the end of file behind the data (RDHUP), and urgent data, at whose mark
        tcp_recvmsg stops (PRI).  While `hinted`, only empty-handed reads count.  While `ending`,
        which is the first of the two without the second, a short read has met the end of file.
        """
        self.at = now
        if not count:
            self.got_eof = True
        elif count < asked:
            if self.ending:
                self.got_eof = True
            elif not self.hinted:
                self.readable = False

    def empty(self) -> None:
        """A read found nothing (EAGAIN).

        That isn't true if it stands at the mark of urgent data and a signal is just coming in
        (tcp_recvmsg, again).  So while `hinted`, only the second one counts.
        """
        self.readable, self.hinted = self.hinted, False

    def sent(self, count: int, now: float) -> None:
        """The sink took the first `count` bytes of what is held, or of what was just read."""
        self.moved += count
        self.at = now
        if self.held:
            self.held = self.held[count:] or NOTHING
            self.writable = not self.held

    def taken(self, acked: int, now: float) -> None:
        """The sink's peer has acknowledged so many bytes: it moves if they have become more."""
        if self.acked is not None and acked != self.acked:
            self.at = now
        self.acked = acked

    def hold(self, rest: bytes, urgent: bool = False) -> None:
        """The sink didn't take that much of what was just read: it is full."""
        self.held, self.held_urgent = memoryview(rest), urgent
        self.writable = False

    def full(self) -> None:
        """A write found no room (EAGAIN)."""
        self.writable = False

    def shut(self, now: float) -> None:
        """The end of file was passed on."""
        self.sent_eof = True
        self.at = now

    def cut(self) -> None:
        """The sink is gone, and nothing is owed to it any more.

        The source is still read: its side may be unable to take anything until it got rid of what
        it says (an echo), and there may be something for it.
        """
        self.held = NOTHING
        self.sink_gone = self.sent_eof = True
