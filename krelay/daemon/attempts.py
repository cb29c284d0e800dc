"""When relaying that can't begin, or has had to end, is tried again, and what is told of it.

>>> attempts = Attempts()
>>> attempts.failed("no rules", 10.0, again=True), attempts.due(11.9), attempts.due(12.0)
(0, False, True)
"""

from knet.log import Throttle

START_AGAIN, START_AGAIN_MOST = 2.0, 60.0
"""Seconds until a start that failed, or relaying that had to end, is tried again; each time twice
as long."""
STEADY = 60.0
"""Seconds of relaying after which a failure is no sequel of the one before."""
TELL_AGAIN = 60.0
"""Seconds after which a start that goes on failing for the same reason is told once more."""


class Attempts:
    """Why relaying failed, and the time of the next try."""

    def __init__(self) -> None:
        self.reason: str | None = None
        """None: nothing has failed."""
        self.waits_for_port = False
        """Relaying failed because another program has the gateway port: it begins when that is
        free, whatever the time."""
        self._again_at: float | None = None
        self._again_after = START_AGAIN
        self._begun_at = 0.0
        self._is_on = False
        self._told = ""
        self._throttle = Throttle(TELL_AGAIN)

    def clear(self) -> None:
        """Nothing has failed: a try begins, or none is wished any more."""
        self.reason = self._again_at = None
        self.waits_for_port = False

    def afresh(self) -> None:
        """The next failure is the first one of its kind: something was changed since."""
        self._again_after = START_AGAIN

    def begun(self, now: float) -> None:
        """The try was a success."""
        self._begun_at = now
        self._is_on = True
        self._told = ""

    def ended(self) -> None:
        """Relaying was ended, and isn't to begin by itself."""
        self._is_on = False
        self._again_at = None

    def failed(self, reason: str, now: float, *, again: bool) -> int | None:
        """It failed; `again`: it is to be tried again.  Says whether to tell, as Throttle does."""
        if self._is_on and now - self._begun_at >= STEADY:
            self.afresh()
        self.ended()
        self.reason = reason
        if again:
            self._again_at = now + self._again_after
            self._again_after = min(2 * self._again_after, START_AGAIN_MOST)
        if reason != self._told:
            self._told = reason
            self._throttle = Throttle(TELL_AGAIN)
        return self._throttle.admit(now)

    def wait_for_port(self) -> None:
        """It has failed for the gateway port: no time is set for the next try."""
        self._again_at = None
        self.afresh()
        self.waits_for_port = True

    def due(self, now: float) -> bool:
        """Whether it is to be tried again now."""
        return self._again_at is not None and now >= self._again_at

    def retry_in(self, now: float) -> float | None:
        """Seconds until the next try; None if nothing failed, or it waits for the gateway port."""
        if self.reason is None or self._again_at is None:
            return None
        return max(0.0, self._again_at - now)
