"""The event loop: epoll, timers, signals and calls put off to the next turn.

Every daemon here runs on this one.

Some facts about epoll, and what they mean here:

- It watches open file descriptions, not descriptors.  Closing a descriptor takes its registration
  away only if nothing else (a dup, a child) holds the description open; otherwise events go on
  arriving under a number that may by then be another file's.  So: `remove(fd)` first, close
  second, both in the object that owns the descriptor; `closing(fd)` where that alone holds it open.
- A number is reused at once.  One wake-up brings a batch of events; a handler may close 7 and
  accept a new 7 while an event for the old 7 is still in the batch.  What was removed during a
  batch gets nothing more from that batch; what the new 7 has to say comes with the next wake-up,
  because registering looks at the state the file is in.
- Readiness is a hint.  Between the event and the call the state may have changed (checksums fail,
  another process was quicker). So handlers try, and treat EAGAIN as "not yet".  ERR and HUP are
  reported whether asked for or not.
- Level-triggered (the default) repeats an event until its cause is gone: nothing is lost, but
  interest in OUT must be taken away when there is nothing to send, or the loop spins.
  Edge-triggered (EPOLLET) speaks once per change: the mask never needs touching, which saves a
  system call per turn, but a handler that stops before EAGAIN must remember that itself. Both are
  to be had here; a mask is passed on as it is.

Why not asyncio: it gives streams and tasks for what is a few hundred nanoseconds of work per event,
three times the cost of the relay's whole pump.

A turn is: wait, read the clock (`now`, once), run the handlers of the batch, the timers that are
due, and the calls that `call_soon` had collected by then.  An exception from any of them leaves
`run()`: the loop can't know whether it was harmless. Nothing else is lost by it; the caller may
close, or call `run()` again, which goes on behind the one that raised.

A process can stand still: SIGSTOP, a frozen cgroup, a debugger, a virtual machine that is paused.
Its peers' packets wait meanwhile, or are asked for again; so none of that time may count as their
silence.  `now` is a clock that leaves it out: a turn that took ABSENT longer than it was to take
counts as none.  And timers wait until all events were read that had waited.

An OSError is another matter: the kernel refuses something at some moment (no descriptor, no memory,
a full disk), and that must end no daemon.  With `on_failure` it is told, and the
loop goes on behind it.  A handler that is in the middle of something has to see to that itself: to
what it leaves half done, and to its next call.
"""

import errno
import heapq
import select
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from types import FrameType
from typing import Any, Self

MAX_EVENTS = 256
"""Events per wake-up: enough to make the wait cheap, few enough that timers aren't late."""
PAUSE = 0.001
"""Seconds that the loop sleeps after a failure: one that repeats for ever takes no whole core."""
ABSENT = 1.0
"""Seconds: a process that waited for that much longer than it was to stood still.  Then none of the
wait counts, as it can't be seen when the pause began; a pause that was over before that is not seen
at all, and what came meanwhile is handled before any timer."""
BEHIND = 100
"""Turns for which timers wait at most, though each is full of events."""
HOST_FAILS = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EIO, errno.EPERM}
    | {errno.ENOSPC, errno.EROFS}
)
"""Errors of a read or a write that no peer can cause: the same call may do better a bit later."""


class Timer:
    """A call at a certain time, until it was made or cancelled."""

    __slots__ = ("_fn", "_loop", "when")

    def __init__(self, loop: "Loop", when: float, fn: Callable[[], object]) -> None:
        self._loop = loop
        self._fn: Callable[[], object] | None = fn
        self.when = when

    @property
    def pending(self) -> bool:
        """Whether the call is still to come."""
        return self._fn is not None

    def cancel(self) -> None:
        """The call won't be made, and what it referred to is let go.

        Does nothing if made or cancelled already.
        """
        if self._fn is not None:
            self._fn = None
            self._loop._one_cancelled()

    def _fire(self) -> None:
        fn, self._fn = self._fn, None
        if fn is not None:
            fn()


class Loop:
    """One epoll instance and what hangs on it.

    Used from one thread; signals need it to be the main one.
    """

    def __init__(self) -> None:
        self.now = time.monotonic()
        """Seconds, monotonic, without those of `absent`: when this turn began."""
        self.absent = 0.0
        """Seconds for which this process stood still, so far."""
        self.on_absence: Callable[[float], object] = lambda seconds: None
        """Is told of each, of so many seconds."""
        self.on_failure: Callable[[OSError], object] | None = None
        """Is told of the OSErrors that calls let through; None: `run` lets them through."""
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], object]] = {}
        self._batch: Iterator[tuple[int, int]] = iter(())
        self._removed: set[int] = set()  # since this batch was fetched
        self._timers: list[tuple[float, int, Timer]] = []
        self._made = 0  # timers so far: those of one instant fire in the order they were made in
        self._cancelled = 0  # of those in the heap
        self._soon: deque[Callable[[], object]] = deque()
        self._signals = _Signals(self)
        self._running = False
        self._behind = 0  # turns in which there may be events that came while this stood still

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, fd: int, mask: int, handler: Callable[[int], object]) -> None:
        """Calls `handler(events)` whenever `fd` has some of `mask` (or ERR, HUP).

        Raises OSError: FileExistsError for a descriptor that is registered already, PermissionError
        for a file that can't be waited for.
        """
        self._epoll.register(fd, mask)
        self._handlers[fd] = handler

    def set_handler(self, fd: int, handler: Callable[[int], object]) -> None:
        """Calls this one instead from now on, for a descriptor that is registered."""
        self._handlers[fd] = handler

    def modify(self, fd: int, mask: int) -> None:
        """Waits for `mask` from now on; an edge-triggered descriptor is looked at afresh."""
        self._epoll.modify(fd, mask)

    def remove(self, fd: int) -> None:
        """Forgets `fd`, which must still be open.

        Its handler isn't called any more, not even for this batch's events.  Does nothing for one
        that is not registered: whose owner was told by `add` that it can't be, and lets go.
        """
        if self._handlers.pop(fd, None) is None:
            return
        self._removed.add(fd)
        try:
            self._epoll.unregister(fd)
        except OSError:
            self._epoll.unregister(fd)  # or its events would find no handler

    def closing(self, fd: int) -> None:
        """Forgets `fd`, which the caller closes next, and which nothing else holds open.

        What `remove` does, but for the system call: the last close takes the registration away.
        """
        del self._handlers[fd]
        self._removed.add(fd)

    def call_at(self, when: float, fn: Callable[[], object]) -> Timer:
        """Calls `fn` at `when` (seconds, on the clock of `now`) or some milliseconds later."""
        timer = Timer(self, when, fn)
        self._made += 1
        heapq.heappush(self._timers, (when, self._made, timer))
        return timer

    def call_soon(self, fn: Callable[[], object]) -> None:
        """Calls `fn` at the end of this turn; of the next if its calls are being made."""
        self._soon.append(fn)

    def clock(self) -> float:
        """The time as `now` has it, at this moment."""
        return time.monotonic() - self.absent

    def on_signal(self, signum: int, fn: Callable[[], object]) -> None:
        """Calls `fn` from the loop after that signal; `close` puts the old behaviour back."""
        self._signals.on(signum, fn)

    def run(self) -> None:
        """Turns until `stop`.

        Lets through whatever a handler raises, but for what `on_failure` is told; may be called
        again after that.
        """
        self._running = True
        while True:
            try:
                return self._run()
            except OSError as error:
                if self.on_failure is None:
                    raise
                self.on_failure(error)
                time.sleep(PAUSE)

    def _run(self) -> None:
        handlers, removed = self._handlers, self._removed
        wait, clock = self._epoll.poll, time.monotonic
        self.now = self.clock()  # what was done before is no absence
        while True:
            for fd, events in self._batch:
                if removed and fd in removed:
                    continue
                handler = handlers.get(fd)
                if handler is None:
                    self._nobodys(fd)
                else:
                    handler(events)
            if self._timers and not self._behind:
                self._fire_due()
            if soon := self._soon:
                for _ in range(len(soon)):
                    soon.popleft()()
            if not self._running:
                return
            patience = self._patience()
            batch = wait(patience, MAX_EVENTS)
            self._batch = iter(batch)
            removed.clear()
            now = clock() - self.absent
            if self._behind:
                self._behind = self._behind - 1 if len(batch) == MAX_EVENTS else 0
            if now - self.now > patience + ABSENT and patience >= 0:
                self._stood_still(now - self.now)
            else:
                self.now = now

    def stop(self) -> None:
        """`run` returns at the end of this turn."""
        self._running = False

    def close(self) -> None:
        """Lets go of everything the loop itself opened; the registered descriptors stay open.

        May be called twice.
        """
        self._signals.close()
        self._epoll.close()
        self._handlers.clear()
        self._timers.clear()
        self._soon.clear()

    def _patience(self) -> float:
        """Seconds until something is due, -1 for ever; epoll rounds up to milliseconds."""
        if self._soon:
            return 0.0
        if not self._timers:
            return -1.0
        return max(0.0, self._timers[0][0] - self.clock())  # `now` is as old as this turn

    def _nobodys(self, fd: int) -> None:
        """An event of a file that was to be closed, and was not: it is to have no others."""
        with suppress(OSError):
            self._epoll.unregister(fd)

    def _stood_still(self, seconds: float) -> None:
        self.absent += seconds
        self._behind = BEHIND
        self.on_absence(seconds)

    def _fire_due(self) -> None:
        timers, now = self._timers, self.now
        while timers and timers[0][0] <= now:
            timer = heapq.heappop(timers)[2]
            if timer.pending:
                timer._fire()
            else:
                self._cancelled -= 1

    def _one_cancelled(self) -> None:
        # Most timers guard against what never happens.  They are left in the heap, until they are
        # the greater part of it.
        self._cancelled += 1
        if self._cancelled > 64 and 2 * self._cancelled > len(self._timers):
            self._timers[:] = [entry for entry in self._timers if entry[2].pending]
            heapq.heapify(self._timers)
            self._cancelled = 0


class _Signals:
    """Signals turned into readiness: their numbers come out of a socket that the loop reads.

    Not signalfd: blocked signals would be inherited by child processes.  Not code in the handler:
    it would run between any two lines of the program.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._calls: dict[int, Callable[[], object]] = {}
        self._before: dict[int, Any] = {}
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._wakeup_before = -1

    def on(self, signum: int, fn: Callable[[], object]) -> None:
        if self._pair is None:
            self._pair = reader, writer = socket.socketpair()
            reader.setblocking(False)
            writer.setblocking(False)
            self._wakeup_before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
            self._loop.add(reader.fileno(), select.EPOLLIN, self._arrived)
        self._calls[signum] = fn
        before = signal.signal(signum, _noted)
        self._before.setdefault(signum, before)

    def _arrived(self, _: int) -> None:
        assert self._pair is not None
        try:
            numbers = self._pair[0].recv(4096)
        except BlockingIOError:
            return
        for number in dict.fromkeys(numbers):
            if fn := self._calls.get(number):
                fn()

    def close(self) -> None:
        for signum, before in self._before.items():
            signal.signal(signum, signal.SIG_DFL if before is None else before)
        self._before.clear()
        if self._pair is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            for end in self._pair:
                end.close()
            self._pair = None


def _noted(_signum: int, _frame: FrameType | None) -> None:
    """The handler as the interpreter sees it; the number is in the socket by then."""
