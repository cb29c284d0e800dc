"""TCP seen from the middle: how far a relayed connection has come.

A relayed connection is two TCP connections, the client leg (steps T1, T2) and the server leg (T3,
T4).  A relay in the middle doesn't see every packet, so it keeps facts, not a state machine of its
own, and derives the four states that a timeout is chosen by:

    opening      until the client has completed its handshake and the server has answered
    established  from then on, also while one side has ended and the other still sends: such a
                 half-closed connection may live for hours (RFC 6146, section 3.5.2.2, likewise
                 keeps the long timeout until both sides have sent a FIN)
    closing      both sides have sent a FIN, or anyone a RST.  The row stays, since a RST may
                 be forged or lost (RFC 7857, section 2.2); a packet of either end that comes
                 after it shows that, and the RST is forgotten (RFC 6146, section 3.5.2.2)
    closed       tcp-relay has closed both legs

Anybody can forge a FIN or RST who knows addresses and ports.  Where tcp-relay ends the connection,
its host knows the numbers and has judged it by them before tcp-relay hears of it: so only what that
host sends itself counts, a FIN by which tcp-relay passes an end on, or a RST.
"""

from dataclasses import dataclass
from enum import IntEnum, StrEnum

from krelay.wire.tcp import ACK, FIN, RST, SYN


class State(StrEnum):
    """The states of a row: four of TCP, two of UDP."""

    OPENING = "opening"
    ESTABLISHED = "established"
    CLOSING = "closing"
    CLOSED = "closed"
    UNREPLIED = "unreplied"
    REPLIED = "replied"


class Side(IntEnum):
    """Whose packet it is: a real end of the conversation's, or tcp-relay's own on a leg."""

    CLIENT = 0
    SERVER = 1
    TO_CLIENT = 2
    TO_SERVER = 3


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


@dataclass(slots=True)
class Through(Tracker):
    """The facts about a connection that goes through this host, forwarded or a client's own."""

    def saw(self, side: Side, flags: int) -> None:
        """Takes note of the TCP flags of a packet from this side."""
        if flags & RST:
            self.reset = True
        elif side is _CLIENT:
            self.reset = False
            if flags & ACK:
                self.client_acked = True
            if flags & FIN:
                self.client_ended = True
        elif side is _SERVER:
            self.reset = False
            if flags & (ACK | SYN):
                self.server_answered = True
            if flags & FIN:
                self.server_ended = True


_CLIENT, _SERVER, _TO_SERVER = Side.CLIENT, Side.SERVER, Side.TO_SERVER
_OPENING, _ESTABLISHED = State.OPENING, State.ESTABLISHED
_CLOSING, _CLOSED = State.CLOSING, State.CLOSED
# By these names: looking one up in its class takes ten times as long.
