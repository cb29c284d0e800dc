"""Hours of a daemon in seconds: a loop whose clock jumps to what is due next, and what is left.

Descriptors are the real ones.  Whoever talks to the daemon does so by the daemon's own loop; so
what he has sent is there at the next look, and time passes only when nobody has anything to say.
"""

import gc
import select
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

from knet.loop import Loop


class Clock:
    """Stands in for the module `time` where a daemon reads it."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        """Seconds; the same until somebody has waited."""
        return self.now

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


class Poll:
    """An epoll that waits by putting the clock on."""

    def __init__(self, clock: Clock) -> None:
        self._epoll = select.epoll()
        self._clock = clock

    def poll(self, timeout: float, maxevents: int) -> list[tuple[int, int]]:
        """As epoll's own."""
        events = self._epoll.poll(0, maxevents)
        if not events:
            assert timeout >= 0, "nothing would ever happen again"
            self._clock.now += timeout
        return events

    def __getattr__(self, name: str) -> object:
        return getattr(self._epoll, name)


@contextmanager
def simulated(*modules: str) -> Iterator[Loop]:
    """A loop on such a clock, which these modules read as well."""
    clock = Clock()
    with ExitStack() as stack:
        for module in ("knet.loop", *modules):
            stack.enter_context(mock.patch(f"{module}.time", clock))
        loop = stack.enter_context(Loop())
        loop._epoll.close()
        loop._epoll = Poll(clock)  # type: ignore[assignment]
        yield loop


def run_for(loop: Loop, seconds: float) -> None:
    """Lets that much time pass."""
    loop.call_at(loop.now + seconds, loop.stop)
    loop.run()


def every(loop: Loop, seconds: float, story: Callable[[], object]) -> None:
    """Has it go on again and again."""

    def again() -> None:
        story()
        loop.call_at(loop.now + seconds, again)

    loop.call_at(loop.now + seconds, again)


def garbage(run: Callable[[], object]) -> Counter[str]:
    """What `run` has left behind that the cyclic collector alone would find: how many, by type."""
    gc.collect()
    was_on, flags = gc.isenabled(), gc.get_debug()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        run()
        gc.collect()
        return Counter(map(_kind, gc.garbage))
    finally:
        gc.set_debug(flags)
        gc.garbage.clear()
        if was_on:
            gc.enable()


def _kind(thing: object) -> str:
    name = f"{type(thing).__module__}.{type(thing).__qualname__}"
    own = getattr(thing, "__qualname__", None)
    return f"{name} {own}" if isinstance(own, str) else name
