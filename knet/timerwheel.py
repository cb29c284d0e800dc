"""What is to be looked at, by the second in which to do so.

A packet never touches this: what was heard of meanwhile is moved on when its second comes.
"""

from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Wheel(Generic[T]):
    """Things by the second in which to look at them.  One may be in it more than once."""

    def __init__(self) -> None:
        self.next = 0
        """The first second that hasn't been looked at."""
        self._seconds: dict[int, list[T]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._seconds.values()))

    def second(self, when: float) -> int:
        """The second in which what is due at `when` can be looked at: then it is over."""
        return max(int(when) + 1, self.next)

    def put(self, second: int, thing: T) -> None:
        """To be looked at in that second, which `second` has given or which is later."""
        self._seconds.setdefault(second, []).append(thing)

    def due(self, now: float) -> Iterator[tuple[int, list[T]]]:
        """What was put into each second until now, which is thereby taken out, in order.

        Cheap: looks at no other seconds, however long ago the last look was.
        """
        until = int(now)
        if until - self.next > len(self._seconds):
            seconds = sorted(second for second in self._seconds if second <= until)
        else:
            passed = range(self.next, until + 1)
            seconds = [second for second in passed if second in self._seconds]
        self.next = until + 1
        for second in seconds:
            yield second, self._seconds.pop(second)

    def clear(self) -> None:
        """Takes out all."""
        self._seconds.clear()
