"""TCP seen from the middle: how far a relayed connection has come.

A relayed connection is two TCP connections, the client leg (steps T1, T2) and the server leg (T3,
T4).  A relay in the middle doesn't see every packet, so it keeps facts, not a state machine of its
own, and derives the four states that a timeout is chosen by:

    opening      until the client has completed its handshake and the server has answered
    established  from then on, also while one side has ended and the other still sends: such a
                 half-closed connection may live for hours (RFC 6146, section 3.5.2.2, likewise
                 keeps the long timeout until both sides have sent a FIN)
    closing      both sides have sent a FIN, or any side a RST.  The flow stays, since a RST may
                 be forged or lost (RFC 7857, section 2.2); a packet of either end that comes
                 after it shows that, and the RST is forgotten (RFC 6146, section 3.5.2.2)
    closed       tcp-relay has closed both legs

A FIN or RST can be forged with the addresses and ports alone.  Where tcp-relay ends the connection,
its host knows the numbers and has judged it by them before tcp-relay hears of it: so only what that
host sends itself counts, a FIN by which tcp-relay passes an end on, or a RST.

What goes through this host has no such judge.  There a connection is established when each end has
acknowledged the other's SYN, by its number, and refused by a RST that has the number of what it
refuses.  Later its packets go past the worker, and its numbers aren't known here: flags decide, but
never what becomes of a packet, only when the flow goes.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from knet.wire.tcp import ACK, FIN, RST, SYN
from krelay.steps import Side


class State(StrEnum):
    """The states of a flow: four of TCP, two of UDP."""

    OPENING = "opening"
    ESTABLISHED = "established"
    CLOSING = "closing"
    CLOSED = "closed"
    UNREPLIED = "unreplied"
    REPLIED = "replied"


@dataclass(slots=True)
class Tracker:
    """The facts about a connection that tcp-relay terminates."""

    client_acked: bool = False
    """The client has sent something after its SYN."""
    server_answered: bool = False
    client_ended: bool = False
    """The client has ended its direction."""
    server_ended: bool = False
    reset: bool = False
    closed: bool = False

    def saw(self, side: Side, flags: int) -> None:
        """Takes note of the TCP flags of a packet from this side."""
        if side is _CLIENT:
            if not flags & RST:
                self.reset = False
                if flags & ACK:
                    self.client_acked = True
        elif side is _SERVER:
            if not flags & RST:
                self.reset = False
                if flags & (ACK | SYN):
                    self.server_answered = True
        elif flags & RST:
            self.reset = True
        elif flags & FIN:
            if side is _TO_SERVER:
                self.client_ended = True
            else:
                self.server_ended = True

    @property
    def is_watched(self) -> bool:
        """Whether each packet of an end may change these facts, not only those with certain
        flags."""
        return self.reset or not (self.client_acked and self.server_answered)

    def resumed(self) -> None:
        """The connection was established before this tracker began."""
        self.client_acked = self.server_answered = True

    @property
    def state(self) -> State:
        """Where the connection stands."""
        if self.closed:
            return _CLOSED
        if self.reset or (self.client_ended and self.server_ended):
            return _CLOSING
        if self.client_acked and self.server_answered:
            return _ESTABLISHED
        return _OPENING


class TcpSegment(NamedTuple):
    """What a packet says of its connection."""

    flags: int
    seq: int
    ack: int
    size: int
    """By how much the numbers advance: its bytes, SYN and FIN."""


@dataclass(slots=True)
class Through(Tracker):
    """The facts about a connection that goes through this host, forwarded or a client's own.

    While it opens, all its packets are seen here, and so their numbers; later most go past.
    """

    client_next: int | None = None
    """What follows the client's SYN; of a connection picked up in its midst, the packet that was
    seen first."""
    client_again: int | None = None
    """What follows another SYN of the client's: one of them may be forged."""
    server_next: int | None = None
    """What follows the server's SYN."""
    server_top: int | None = None
    """What follows all that the server has said while the connection was opening."""
    picked_up: bool = False

    def segment(self, side: Side, segment: TcpSegment) -> None:
        """Takes note of a packet of the client's or the server's."""
        is_open = self.client_acked and self.server_answered
        if segment.flags & RST:
            self.reset |= is_open or self._is_refused(side, segment)
            return
        self.reset = False
        if is_open and segment.flags & FIN:
            self.client_ended |= side is _CLIENT
            self.server_ended |= side is _SERVER
        elif not is_open and side is _CLIENT:
            self._of_client(segment)
        elif not is_open:
            self._of_server(segment)

    def _of_client(self, segment: TcpSegment) -> None:
        flags, seq, ack, size = segment
        if flags & (SYN | ACK) == SYN:
            following = (seq + 1) % _WRAP
            if self.client_next is None:
                self.client_next = following
            elif following != self.client_next:
                self.client_again = following
        elif flags & ACK and not self.client_acked:
            if self.client_next is None:
                self.client_next, self.server_next = (seq + size) % _WRAP, ack
                self.client_acked = self.picked_up = True
            elif self.server_next is not None and self.server_top is not None:
                said = (self.server_top - self.server_next) % _WRAP
                self.client_acked = (ack - self.server_next) % _WRAP <= said

    def _of_server(self, segment: TcpSegment) -> None:
        flags, seq, ack, size = segment
        begun = (self.client_next, self.client_again)
        if self.picked_up and self.client_next is not None and self.server_next is not None:
            near = _near(ack, self.client_next) and _near(seq, self.server_next)
            self.server_answered = bool(flags & ACK) and near
        elif flags & SYN:
            if not self.server_answered and (not flags & ACK or ack in begun):
                self.server_next = self.server_top = (seq + 1) % _WRAP
                self.server_answered = bool(flags & ACK)
        elif self.server_next is not None and flags & ACK:
            self.server_answered |= ack in begun
            following = (seq + size) % _WRAP
            if (following - self.server_next) % _WRAP < _WINDOW:
                self.server_top = following

    def _is_refused(self, side: Side, segment: TcpSegment) -> bool:
        """Whether a RST has the number of what it refuses."""
        begun = (self.client_next, self.client_again)
        if side is _CLIENT:
            return segment.seq in begun
        return (bool(segment.flags & ACK) and segment.ack in begun) or (
            segment.seq == self.server_next
        )


def _near(one: int, other: int) -> bool:
    return (one - other + _WINDOW) % _WRAP <= 2 * _WINDOW


_WRAP = 1 << 32
_WINDOW = 1 << 24
"""Bytes that may be under way (RFC 7323 allows more; what hosts use is less)."""
_CLIENT, _SERVER, _TO_SERVER = Side.CLIENT, Side.SERVER, Side.TO_SERVER
_OPENING, _ESTABLISHED = State.OPENING, State.ESTABLISHED
_CLOSING, _CLOSED = State.CLOSING, State.CLOSED
# By these names: looking one up in its class takes ten times as long.
