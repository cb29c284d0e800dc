"""Two channels make a relayed connection: `up` from the client to the server, `down` the other way.

The channels share nothing.  Each ends by itself, so a side that has finished sending can go on
receiving for as long as the other likes (half-close, RFC 9293 section 3.6); the session has
ended when both have.  What an event at a socket, or its loss, means for them is said here: what is
read there feeds one channel, what is written there drains the other.

So is time.  A session that moves, or has nothing to move, may live for ever.  What may not: bytes
that wait for a sink that takes none (it would hold memory, and its peer, as long as it likes), and
one direction left open by a peer that has forgotten it.

    >>> session = Session()
    >>> session.down.hold(b"for a client that doesn't read")
    >>> limits = SessionLimits(stall=10.0)
    >>> session.deadline(limits), session.overdue(10.0, limits)
    (10.0, <End.STALLED: 'stalled'>)
"""

from dataclasses import dataclass, field
from enum import IntEnum, StrEnum

from tcp_relay.engine.channel import Channel
from tcp_relay.engine.limits import SessionLimits


class SessionSide(IntEnum):
    """Whose socket."""

    CLIENT = 0
    SERVER = 1

    def __str__(self) -> str:
        return self.name.lower()


CLIENT, SERVER = SessionSide


class End(StrEnum):
    """Why a connection has ended; all but the first reset both sides."""

    CLOSED = "closed"  # both ends of file were passed on
    RESET = "reset"  # one side was reset, or can't be written to
    STALLED = "stalled"  # one side took nothing of what was held
    FORGOTTEN = "forgotten"  # one direction was left open, and nothing came
    CONNECT_FAILED = "connect_failed"  # the server
    REFUSED = "refused"  # there is no server for this client
    DRAINED = "drained"  # it outlived the drain
    KILLED = "killed"  # by krelay, or because the program ends at once


@dataclass(slots=True)
class Session:
    """The two directions of one relayed connection."""

    up: Channel = field(default_factory=Channel)
    down: Channel = field(default_factory=Channel)
    why: str = ""
    """How the first side was lost, in words."""

    def fed_by(self, side: SessionSide) -> Channel:
        """The channel whose source is that side."""
        return self.down if side else self.up

    def drained_by(self, side: SessionSide) -> Channel:
        """The channel whose sink is that side."""
        return self.up if side else self.down

    def lost(self, side: SessionSide, now: float, why: str = "") -> None:
        """Reading from `side` failed: its connection is gone, in both directions.

        What came from there before is still delivered, then the reset.
        """
        channel = self.fed_by(side)
        channel.got_eof = channel.got_reset = True
        channel.at = now
        self.drained_by(side).cut()
        self.why = why

    @property
    def is_smooth(self) -> bool:
        """Both channels are."""
        return self.up.is_smooth and self.down.is_smooth

    @property
    def ended(self) -> bool:
        """Both ends of file were passed on, and no reset is to be."""
        return self.up.sent_eof and self.down.sent_eof and not self.is_resetting

    @property
    def held(self) -> int:
        """Bytes."""
        return len(self.up.held) + len(self.down.held)

    @property
    def at(self) -> float:
        """When anything last moved."""
        return max(self.up.at, self.down.at)

    @property
    def is_resetting(self) -> bool:
        """One side is lost, and the other isn't told yet."""
        return self.up.got_reset or self.down.got_reset

    @property
    def may_stall(self) -> bool:
        """Something waits for a sink to take it."""
        return bool(self.up.held or self.down.held) or self.is_resetting

    @property
    def is_channel_closed(self) -> bool:
        """One side has finished, and the other one not."""
        return self.up.sent_eof is not self.down.sent_eof

    def deadline(self, limits: SessionLimits) -> float | None:
        """When it will be overdue if nothing moves until then; None: never."""
        due = (self._stalled_at(limits), self._forgotten_at(limits))
        return min((at for at in due if at is not None), default=None)

    def overdue(self, now: float, limits: SessionLimits) -> End | None:
        """Why it is to be ended now, if it is."""
        stalled, forgotten = self._stalled_at(limits), self._forgotten_at(limits)
        if stalled is not None and now >= stalled:
            return End.RESET if self.is_resetting else End.STALLED
        return End.FORGOTTEN if forgotten is not None and now >= forgotten else None

    def overdue_in_words(self, end: End, limits: SessionLimits) -> str:
        """Why that is its end, as it stands in logs."""
        if end is End.STALLED:
            channel, sink = (self.up, SERVER) if self.up.held else (self.down, CLIENT)
            return f"the {sink} took none of {len(channel.held)} bytes for {limits.stall:g} s"
        if end is End.FORGOTTEN:
            side = CLIENT if self.up.sent_eof else SERVER
            return f"the {side} has finished, and nothing came for {limits.half_close:g} s"
        return self.why

    def _stalled_at(self, limits: SessionLimits) -> float | None:
        waiting = [
            channel.at for channel in (self.up, self.down) if channel.held or channel.got_reset
        ]
        return min(waiting) + limits.stall if waiting else None

    def _forgotten_at(self, limits: SessionLimits) -> float | None:
        return self.at + limits.half_close if self.is_channel_closed else None
