"""A loop in which nothing waits: a test makes its time pass, and its events come."""

from collections.abc import Callable

from knet.loop import Loop


class SteppedLoop(Loop):
    """Its time stands still until `advance`; `handlers` are those of what is registered."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.handlers: dict[int, Callable[[int], object]] = {}

    def add(self, fd: int, mask: int, handler: Callable[[int], object]) -> None:
        assert fd not in self.handlers
        self.handlers[fd] = handler

    def remove(self, fd: int) -> None:
        self.handlers.pop(fd, None)

    def clock(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """So many seconds pass, and each timer is called at its time."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now = max(self.now, self._timers[0][0])
            self._fire_due()
        self.now = end
