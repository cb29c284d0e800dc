"""The fixed-timeout queue: for waits that are all equally long.

Nearly every wait ends before its time: a server answers, a half-closed connection is closed.  A
heap of timers makes all of them pay for the order they are in.  Where all waits take the same
number of seconds the order is the one they began in, which a dict keeps for nothing; one timer
looks at the first.
"""

from collections.abc import Callable
from itertools import takewhile
from typing import Generic, TypeVar

from knet.loop import Loop

T = TypeVar("T")


class FixedTimeoutQueue(Generic[T]):
    """Calls `expired(entry)` for each entry that has waited for `seconds`, and drops the entry."""

    def __init__(self, loop: Loop, seconds: float, expired: Callable[[T], object]) -> None:
        self.seconds = seconds
        self._loop = loop
        self._expired = expired
        self._since: dict[T, float] = {}
        self._has_timer = False

    def __contains__(self, entry: T) -> bool:
        return entry in self._since

    def add(self, entry: T) -> None:
        """It waits from now on, also if it waits already."""
        since, now = self._since, self._loop.now
        if entry in since:
            del since[entry]
        since[entry] = now
        if not self._has_timer:
            self._set_timer(now)

    def discard(self, entry: T) -> None:
        """It waits no more, if it did."""
        self._since.pop(entry, None)

    def _set_timer(self, since: float) -> None:
        self._has_timer = True
        self._loop.call_at(since + self.seconds, self._look)

    def _look(self) -> None:
        self._has_timer = False
        # The very sum that the timer was set to: a difference, rounded otherwise, may find none
        # late, and the timer would be due again, in the same instant, for ever.
        since, now = self._since, self._loop.now
        late = list(takewhile(lambda entry: since[entry] + self.seconds <= now, since))
        try:
            for entry in late:
                if self._since.pop(entry, None) is not None:  # else it went with one before it
                    self._expired(entry)
        finally:  # those that are left have their turn also where one call fails
            if self._since and not self._has_timer:
                self._set_timer(next(iter(self._since.values())))
