"""When the cyclic collector runs: the one decision for all daemons here.

It is off.  Left on, it would walk every flow, socket and session there is, many times a minute, for
circles that these programs don't leave behind: the code that ends a flow or a connection cuts its
circles, and tests hold an hour of each daemon to that.  What the interpreter and the modules are
made of is set aside (`gc.freeze`), so that it is never walked at all.

But one circle a second that was overlooked fills a machine in some months.  So once a
second, if anything happens, the blocks of memory in use are counted, which costs some microseconds;
and when there are more than can be accounted for, the collector runs, once.  So what it alone could
free is bounded: by SLACK, some ten megabytes, or by half of what else is needed.  A program that
doesn't grow never pauses for it; the pause is some 30 milliseconds for the SLACK, 120 with 65,536
flows.

`Growth` decides and knows no collector; `Collector` has one.
"""

import gc
import sys
import time
from collections.abc import Callable

from knet.log import Log

LOOK_EVERY = 1.0
"""Seconds between counts, at least: an idle daemon leaves nothing, and isn't woken for one."""
SLACK = 100_000
"""Blocks of memory: an object is one, or two or three."""

_log = Log("collector")


class Growth:
    """Whether blocks in use are more than can be accounted for.

    `known` are those of what is known to live, flows or connections; the others were needed when
    last looked through, or they are suspect.

    >>> growth = Growth(blocks=1_050_000, known=1_000_000)
    >>> growth.is_suspect(2_050_000, known=2_000_000), growth.is_suspect(2_160_000, known=2_000_000)
    (False, True)
    """

    def __init__(self, blocks: int, known: int) -> None:
        self._others = max(0, blocks - known)

    def is_suspect(self, blocks: int, known: int) -> bool:
        """Whether the collector should have a look."""
        others = max(0, blocks - known)
        self._others = min(self._others, others)
        return others > self._others + max(SLACK, self._others // 2)

    def needed(self, blocks: int, known: int) -> None:
        """The collector has left these."""
        self._others = max(0, blocks - known)


class Collector:
    """Takes the collector over; to be made when the daemon is built.

    `known` tells how many blocks what lives by its own account may have.
    """

    def __init__(self, known: Callable[[], int]) -> None:
        self._known = known
        self._look_at = 0.0
        gc.collect()
        gc.freeze()
        gc.disable()
        self._growth = Growth(sys.getallocatedblocks(), known())

    def on_time(self, now: float) -> None:
        """To be called where something may have been left, as often as one likes."""
        if now < self._look_at:
            return
        self._look_at = now + LOOK_EVERY
        if self._growth.is_suspect(sys.getallocatedblocks(), self._known()):
            self._collect()

    def _collect(self) -> None:
        began = time.perf_counter()
        found = gc.collect()
        pause = time.perf_counter() - began
        blocks = sys.getallocatedblocks()
        self._growth.needed(blocks, self._known())
        _log.info("circles collected", objects=found, blocks=blocks, seconds=round(pause, 4))
