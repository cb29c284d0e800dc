"""What all sessions of a process share: loop, limits, one buffer, counters, live connections.

One buffer serves every read.  The loop is one thread, and what a read brought has left the buffer
before the next one: into the other socket, or, as far as that is full, into the session's own
memory. So ten thousand idle connections hold no buffer, and no memory is allocated for what goes
straight through.  It is also why there are no pipes here (splice): one buffer of half a megabyte
moves bulk as fast as they do, and pipes are scarce (pipe(7), pipe-user-pages-soft).
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Protocol

from knet.log import Failures, Log, stood_still
from knet.loop import Loop
from tcp_relay.engine.counts import Counts, Row, table
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.session import End, Session
from tcp_relay.engine.timeouts import FixedTimeoutQueue

log = Log("engine")


class Live(Protocol):
    """A connection that has not ended."""

    session: Session

    def end(self, end: End, detail: str = "") -> None:
        """Resets both sides, unless `end` is CLOSED."""

    def not_connected(self) -> None:
        """The server has not accepted in time."""

    def check_deadline(self) -> None:
        """Nothing may have moved for long: ends it if that is too long, or waits again."""

    def check(self) -> None:
        """Looks whether both peers are still there; then waits among the `watched` or no more."""

    def row(self) -> Row:
        """As people see it."""


class Engine:
    """`on_room` is called whenever a connection has ended."""

    def __init__(
        self, loop: Loop, limits: SessionLimits, on_room: Callable[[], None] = lambda: None
    ) -> None:
        self.loop = loop
        self.limits = limits
        self.counts = Counts()
        self.view = memoryview(bytearray(limits.hold))
        self.on_room = on_room
        self.capacity = sys.maxsize
        """Connections that there may be at once: two descriptors each."""
        self.connecting: FixedTimeoutQueue[Live] = FixedTimeoutQueue(
            loop, limits.connect, _not_connected
        )
        self.stalled: FixedTimeoutQueue[Live] = FixedTimeoutQueue(
            loop, limits.deadline_check, _check_deadline
        )
        """Those that hold bytes; for how long they may is for them to know."""
        self.half_closed: FixedTimeoutQueue[Live] = FixedTimeoutQueue(
            loop, limits.half_close, _check_deadline
        )
        self.watched: FixedTimeoutQueue[Live] = FixedTimeoutQueue(loop, limits.check, _check)
        """Those that move, or did a moment ago."""
        self._failures = Failures(log)
        self._awake_since = -math.inf
        self._live: dict[Live, None] = {}  # in the order they came

    def host_failed(self, error: OSError) -> None:
        """A call failed for want of something at this host, and will be made again: says so."""
        self._failures.tell(self.loop.now, "a call failed; it is made again", error)

    def use_stall(self, seconds: float) -> None:
        """From now on; also those who are stalled already."""
        self.limits = replace(self.limits, stall=seconds)
        self.stalled.seconds = self.limits.deadline_check
        self.watched.seconds = self.limits.check

    def stood_still(self, seconds: float) -> None:
        """This process did nothing for so long (Loop.on_absence): no peer's silence, that."""
        self._awake_since = self.loop.now
        stood_still(log, seconds)

    @property
    def awake(self) -> float:
        """Seconds since this process stood still."""
        return self.loop.now - self._awake_since

    @property
    def room(self) -> int:
        """How many more there may be."""
        return self.capacity - len(self._live)

    def __len__(self) -> int:
        return len(self._live)

    def opened(self, connection: Live) -> None:
        """A client was accepted."""
        self.counts.accepted += 1
        self._live[connection] = None

    def closed(self, connection: Live, end: End) -> None:
        """It has ended, and both its descriptors are free."""
        del self._live[connection]
        self.counts.ended(end)
        self.on_room()

    def end_all(self, end: End, detail: str) -> None:
        """Ends every connection."""
        for connection in list(self._live):
            connection.end(end, detail)

    def report(self) -> dict[str, int]:
        """The counters, how many connections are open, and the bytes held."""
        held = sum(connection.session.held for connection in self._live)
        return {"open": len(self), "held": held, **self.counts.as_dict()}

    def table(self) -> str:
        """The live connections, for people."""
        rows: Iterable[Row] = (connection.row() for connection in self._live)
        return table(rows, self.counts)


def _not_connected(connection: Live) -> None:
    connection.not_connected()


def _check(connection: Live) -> None:
    connection.check()


def _check_deadline(connection: Live) -> None:
    connection.check_deadline()
