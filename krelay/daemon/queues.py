"""The two queues of packets: that of SYNs to services, and that of all others."""

import select
import time
from collections.abc import Callable
from functools import partial

from knet.log import Failures, Log, Throttle
from knet.loop import PAUSE, Loop
from krelay.datapath.nfqueue import Queue, figures
from krelay.datapath.worker import Worker
from krelay.rules.spec import openings

MAX_OPENINGS = 1024
"""SYNs that wait before the kernel drops more; a client repeats its own after a second."""
OPENINGS_AT_ONCE = 32
"""SYNs handled before the packets of connections that live have their turn: about a millisecond."""
MOST_FAILURES = 20
"""Times in a row that a queue can't be read before it is given up."""

_log = Log("relaying")


class Queues:
    """Has the packets of both handled by `worker`, while they are bound.

    `send` sends a packet of our own; `before_verdicts` is called before SYNs go on; `lost` is
    called with the reason when a queue can't be read any more.
    """

    def __init__(
        self,
        loop: Loop,
        number: int,
        worker: Worker,
        send: Callable[[bytes], object],
        before_verdicts: Callable[[], object],
        lost: Callable[[str], object],
        failures: Failures,
    ) -> None:
        self.bound: list[Queue] = []
        """Those that are."""
        self._loop = loop
        self._number = number
        self._worker = worker
        self._send = send
        self._before_verdicts = before_verdicts
        self._lost = lost
        self._failures = failures
        self._failed_in_a_row = 0
        self._dropped_before = (0, 0)
        self._overflow_warning = Throttle()
        self._overflows_told = 0

    @property
    def waiting(self) -> int:
        """Packets that wait in them."""
        return sum(each.waiting for each in (figures(q.number) for q in self.bound) if each)

    def dropped(self) -> tuple[int, int]:
        """Packets the kernel dropped since they were bound: queue full, socket buffer full."""
        served = [figures(queue.number) for queue in self.bound]
        known = [each for each in served if each is not None]
        if known:
            self._dropped_before = (
                sum(each.queue_dropped for each in known),
                sum(each.socket_dropped for each in known),
            )
        return self._dropped_before

    def bind(self) -> None:
        """Binds both.  Raises QueueUnavailable, OSError; then one may be bound."""
        self._add(Queue(self._number, self._worker, self._send, clock=self._loop.clock))
        self._dropped_before, self._overflows_told = (0, 0), 0
        self._add(
            Queue(
                openings(self._number),
                self._worker,
                self._send,
                most=MAX_OPENINGS,
                batch=OPENINGS_AT_ONCE,
                before_verdicts=self._before_verdicts,
                clock=self._loop.clock,
            )
        )

    def close(self) -> None:
        """Unbinds them: what fails is told, and the rest is done all the same."""
        bound, self.bound = self.bound, []
        for queue in bound:
            with self._failures.going_on(self._loop.now):
                self._loop.remove(queue.fileno())
            with self._failures.going_on(self._loop.now):
                queue.close()

    def warn(self, now: float) -> None:
        """Warns if the kernel has dropped more packets since the last time."""
        lost = sum(self.dropped())
        if lost <= self._overflows_told:
            return
        if self._overflow_warning.admit(now) is not None:
            _log.warning(
                "the queue overflowed: packets dropped by the kernel",
                packets=lost - self._overflows_told,
                in_all=lost,
            )
            self._overflows_told = lost

    def _add(self, queue: Queue) -> None:
        self.bound.append(queue)
        self._loop.add(queue.fileno(), select.EPOLLIN, partial(self._serve, queue))

    def _serve(self, queue: Queue, _: int) -> None:
        try:
            queue.serve()
        except OSError as error:
            if queue not in self.bound:  # given up meanwhile
                return
            self._failed_in_a_row += 1
            if self._failed_in_a_row > MOST_FAILURES:
                self._lost(f"the queue is lost: {error}")
                return
            self._failures.tell(self._loop.now, "the queue can't be read; trying again", error)
            time.sleep(PAUSE)
        else:
            self._failed_in_a_row = 0
