"""Two halves make a relayed connection: `up` from the client to the server, `down` the other way.

The halves share nothing.  Each ends by itself, so a side that has finished sending can go on
receiving for as long as the other likes (half-close, RFC 9293 section 3.6); the pair has ended when
both have.  What a socket's event means for them is said here: readiness to be read is about the
half that the socket feeds, readiness to be written about the one it is fed by.
"""

from dataclasses import dataclass, field
from enum import IntEnum

from tcp_relay.half import Half, Todo


class Side(IntEnum):
    """Whose socket."""

    CLIENT = 0
    SERVER = 1

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(slots=True)
class Pair:
    """The two directions of one relayed connection."""

    up: Half = field(default_factory=Half)
    down: Half = field(default_factory=Half)

    def ready(self, side: Side, read: bool, write: bool, hint: bool) -> None:
        """The socket of `side` may be read, be written, or give short reads (`Half.got`)."""
        source, sink = (self.down, self.up) if side else (self.up, self.down)
        if read:
            source.readable = True
        if hint:
            source.hinted = True
        if write:
            sink.writable = True

    @property
    def busy(self) -> bool:
        """There is something to do without waiting for an event."""
        return self.up.todo() is not Todo.WAIT or self.down.todo() is not Todo.WAIT

    @property
    def ended(self) -> bool:
        """Both ends of file were passed on."""
        return self.up.sent_eof and self.down.sent_eof
