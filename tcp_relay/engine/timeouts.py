"""Those who wait equally long.

Nearly every wait ends before its time: a server answers, a half-closed connection is closed.  A
heap of timers makes all of them pay for the order they are in.  Where everybody waits for the same
number of seconds the order is the one they came in, which a dict keeps for nothing; one timer looks
at the first.
"""

from collections.abc import Callable
from itertools import takewhile
from typing import Generic, TypeVar

from knet.loop import Loop

T = TypeVar("T")


class FixedTimeoutQueue(Generic[T]):
    """Calls `too_late(who)` for each who has waited for `seconds`, and waits no more."""

    def __init__(self, loop: Loop, seconds: float, too_late: Callable[[T], object]) -> None:
        self.seconds = seconds
        self._loop = loop
        self._too_late = too_late
        self._since: dict[T, float] = {}
        self._has_timer = False

    def __contains__(self, who: T) -> bool:
        return who in self._since

    def add(self, who: T) -> None:
        """From now on; who waits already begins anew."""
        since, now = self._since, self._loop.now
        if who in since:
            del since[who]
        since[who] = now
        if not self._has_timer:
            self._set_timer(now)

    def discard(self, who: T) -> None:
        """Waits no more, if it did."""
        self._since.pop(who, None)

    def _set_timer(self, since: float) -> None:
        self._has_timer = True
        self._loop.call_at(since + self.seconds, self._look)

    def _look(self) -> None:
        self._has_timer = False
        # The very sum that the timer was set to: a difference, rounded otherwise, may find nobody
        # late, and the timer would be due again, in the same instant, for ever.
        since, now = self._since, self._loop.now
        late = list(takewhile(lambda who: since[who] + self.seconds <= now, since))
        try:
            for who in late:
                if self._since.pop(who, None) is not None:  # else it went with one before it
                    self._too_late(who)
        finally:  # who is left, also where one call fails, has his turn
            if self._since and not self._has_timer:
                self._set_timer(next(iter(self._since.values())))
