"""The port wait queue: connections that found no local port, or no socket at all.

A host runs out of ports towards a server when many connections a second were closed by this side
first: each port is in TIME_WAIT for a minute then.  The client can't help it, and it passes; so no
client is refused for that, nor for want of descriptors or memory.  Only the first of the queue
tries again, now and then, because a search in vain is long; when it succeeds, so may the next.
"""

from collections import deque
from collections.abc import Callable

from knet.log import Log, Throttle
from knet.loop import Loop

RETRY = 0.05
"""Seconds between looks for a free port."""

log = Log("portqueue")


class PortWaitQueue:
    """First come, first served; its length is how many wait.  `fix` says what would help."""

    def __init__(self, loop: Loop, fix: str) -> None:
        self._loop = loop
        self._fix = fix
        self._waiting: deque[Callable[[], None]] = deque()
        self._complaints = Throttle()
        self._has_timer = False

    def __len__(self) -> int:
        return len(self._waiting)

    def join(self, retry: Callable[[], None], error: OSError | None = None) -> None:
        """Has `retry` called when it is its turn; a connection that fails again joins again.

        `error` says what is missing, if that is no port.
        """
        self._waiting.append(retry)
        self._set_timer()
        if (suppressed := self._complaints.admit(self._loop.now)) is not None:
            log.warning(
                "no socket for a server leg" if error else "no local port is free",
                error=error and error.strerror,
                waiting=len(self._waiting),
                fix=None if error else self._fix,
                suppressed=suppressed or None,
            )

    def _advance(self) -> None:
        self._has_timer = False
        waiting, self._waiting = self._waiting, deque()
        try:
            while waiting and not self._waiting:
                waiting.popleft()()
        finally:
            # One that has joined again was the first, and stays it.
            self._waiting.extend(waiting)
            self._set_timer()

    def _set_timer(self) -> None:
        if self._waiting and not self._has_timer:
            self._has_timer = True
            self._loop.call_at(self._loop.now + RETRY, self._advance)
