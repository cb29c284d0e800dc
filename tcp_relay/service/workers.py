"""Several processes that do the same, and a parent that starts them again when they die.

    parent -- fork --> worker 0: serve(0, ready)
           |-- fork --> worker 1: serve(1, ready)      ready -> a number in one pipe -> parent
           `-- ...                                     death -> pidfd                -> parent

The parent relays nothing, so there is little that could end it; all it has is a pidfd per worker
and the reading end of the pipe.  The workers share nothing: each listens for itself (SO_REUSEPORT).

A worker that died comes back at once, if it had served for a while.  One that dies again and again
waits longer each time, or a fault that hits every process would become a storm of forks.  As long
as no worker has come up at all, something common to all is the likelier fault (the port is in use,
no permission).  Then a failed one waits a little for the others, and when each of them has failed,
trying for ever would help no client: the parent gives up, and its exit status tells.

Signals.  A worker may get one before it has made its own arrangements, or after it has given them
up: what would end it then may do so, the others are ignored; no KeyboardInterrupt comes up inside
it.  Around the fork all are blocked, because until the child has let go of the parent's loop, what
it is sent would be written into the parent's wake-up socket, and be heard there.  Each worker has a
session of its own.  So Ctrl-C, or `kill` and `timeout` with a whole process group, reach the parent
alone, which passes them on once: two SIGTERMs mean something else than one.

If the parent is killed the kernel sends the workers SIGTERM (knet.process): they drain and go.
"""

import os
import select
import signal
import struct
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NoReturn

from knet import process
from knet.log import Failures, Log, Throttle
from knet.loop import Loop, Timer

FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
"""Seconds before a worker that has died twice or more, each time soon, is started again."""

STEADY = 10.0
"""Seconds after which a worker's death is no longer a sequel of the one before."""

START_PAUSE = 1.0
"""Seconds at least before another start as long as no worker has ever been ready."""

COMPLAINT = 60.0
"""Seconds between log lines about a worker whose pauses are at their longest."""

Serve = Callable[[int, Callable[[], None]], int]
"""`serve(index, ready)` calls `ready()` once it serves, and returns its exit status."""

_INTERRUPTED = 128 + signal.SIGINT
_ENDING = (signal.SIGTERM, signal.SIGINT)
_HARMLESS = (signal.SIGHUP, signal.SIGUSR1)
_NUMBER = struct.Struct("=I")

log = Log("workers")


def run(count: int, serve: Serve, grace: float) -> int:
    """Has `serve` run `count` times, in a process each, and tells the service manager when it does.

    The exit status: 0 after SIGTERM, 130 after SIGINT, 1 if no worker came up.  Both signals are
    passed on to the workers, each time they come, and so is SIGUSR1; a worker that is still there
    `grace` seconds after the first is killed.  A single worker is this process itself, its exit
    status and its signals are `serve`'s own affair.

    To be called from the main thread, while there is no other, and with nothing open that a worker
    shouldn't have.
    """
    if count == 1:
        return serve(0, _tell_manager)
    # A parent that ignores its children's deaths isn't told how they died (wait(2)).
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    failures = Failures(log)
    with Loop() as loop:
        loop.on_failure = lambda error: failures.tell(loop.now, "a call failed; going on", error)
        return _Parent(loop, count, serve, grace).run()


def next_pause(pause: float | None) -> float:
    """Seconds before the next start if the last one had to wait for `pause`, and all for nothing.

    >>> pause = None
    >>> [pause := next_pause(pause) for _ in range(9)]
    [0.0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    """
    if pause is None:
        return 0.0
    return min(2 * pause, LONGEST_PAUSE) if pause else FIRST_PAUSE


@dataclass(slots=True)
class _Worker:
    """One of the places to fill, and the process that fills it, if one does."""

    index: int
    pid: int = 0
    """0: none runs."""
    pidfd: int = -1
    since: float = 0.0
    """When the process was started."""
    is_ready: bool = False
    has_failed: bool = False
    """It has died while no worker had been ready yet."""
    pause: float | None = None
    """Before the last start; None if that was the first, or the one after a long life."""
    complaints: Throttle = field(default_factory=lambda: Throttle(COMPLAINT))
    is_told: bool = True
    """Whether the log has the last death, and so is to have the start that follows."""


class _Parent:
    """The workers as their parent sees them."""

    def __init__(self, loop: Loop, count: int, serve: Serve, grace: float) -> None:
        self._loop = loop
        self._serve = serve
        self._grace = grace
        self._workers = [_Worker(index) for index in range(count)]
        self._came_up = False  # one at least was ready
        self._is_told = False  # the service manager is
        self._is_ending = False
        self._exit_status = 0
        self._patience: Timer | None = None
        self._hearing, self._telling = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        loop.add(self._hearing, select.EPOLLIN, self._hear)
        loop.on_signal(signal.SIGTERM, partial(self._end, signal.SIGTERM, 0))
        loop.on_signal(signal.SIGINT, partial(self._end, signal.SIGINT, _INTERRUPTED))
        loop.on_signal(signal.SIGUSR1, partial(self._pass_on, signal.SIGUSR1))
        loop.on_signal(signal.SIGHUP, _ignored)

    def run(self) -> int:
        for worker in self._workers:
            self._loop.call_soon(partial(self._start, worker))
        try:
            self._loop.run()
        finally:
            os.close(self._hearing)
            os.close(self._telling)
        return self._exit_status

    def _start(self, worker: _Worker) -> None:
        if self._is_ending:
            return
        worker.since = self._loop.now
        try:
            worker.pid = self._fork(worker.index)
        except OSError as error:
            self._lost(worker, "worker not started", error=error.strerror)
            return
        try:
            self._watch(worker)
        except OSError as error:  # a process that can't be watched is none of ours
            os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
            worker.pid = 0
            self._lost(worker, "worker not started", error=error.strerror)
            return
        if worker.is_told:
            log.info("worker started", worker=worker.index, pid=worker.pid)

    def _watch(self, worker: _Worker) -> None:
        """Has its end noticed.  Raises OSError, and leaves nothing open then."""
        pidfd = os.pidfd_open(worker.pid)
        try:
            self._loop.add(pidfd, select.EPOLLIN, partial(self._ended, worker))
        except BaseException:
            os.close(pidfd)
            raise
        worker.pidfd = pidfd

    def _ended(self, worker: _Worker, _: int) -> None:
        self._hear()  # its last word, which came before
        self._loop.remove(worker.pidfd)
        os.close(worker.pidfd)
        pid, status = os.waitpid(worker.pid, 0)
        worker.pid, worker.pidfd, worker.is_ready = 0, -1, False
        how = _how_it_ended(status)
        if self._is_ending:
            log.info("worker ended", worker=worker.index, pid=pid, **how)
            self._stop_if_alone()
        else:
            self._lost(worker, "worker ended", pid=pid, **how)

    def _lost(self, worker: _Worker, message: str, **fields: object) -> None:
        """Another start, or none if no worker comes up."""
        now = self._loop.now
        lived = now - worker.since
        worker.pause = pause = next_pause(None if lived >= STEADY else worker.pause)
        worker.has_failed |= not self._came_up
        gives_up = not self._came_up and all(other.has_failed for other in self._workers)
        if not self._came_up:
            pause = max(pause, START_PAUSE)
        suppressed = worker.complaints.admit(now) if pause == LONGEST_PAUSE else 0
        worker.is_told = suppressed is not None
        if worker.is_told:
            log.warning(
                message,
                worker=worker.index,
                **fields,
                lived=round(lived, 3),
                again_in=None if gives_up else pause,
                suppressed=suppressed or None,
            )
        if gives_up:
            log.error("no worker came up", workers=len(self._workers))
            self._end(signal.SIGTERM, 1)
        else:
            self._loop.call_at(now + pause, partial(self._start, worker))

    def _hear(self, _: int = 0) -> None:
        """Which workers are ready."""
        try:
            numbers = os.read(self._hearing, 1024 * _NUMBER.size)
        except OSError:  # nothing; or what is there stays there
            return
        for (index,) in _NUMBER.iter_unpack(numbers):
            self._workers[index].is_ready = True
        self._came_up = True
        if not self._is_told and all(worker.is_ready for worker in self._workers):
            self._is_told = True
            log.info("all workers are ready", workers=len(self._workers))
            _tell_manager()

    def _end(self, signum: int, exit_status: int) -> None:
        self._is_ending = True
        self._exit_status = self._exit_status or exit_status
        if self._patience is None:
            self._patience = self._loop.call_at(self._loop.now + self._grace, self._kill)
        self._pass_on(signum)
        self._stop_if_alone()

    def _pass_on(self, signum: int) -> None:
        for worker in self._workers:
            if worker.pid:
                with suppress(ProcessLookupError):  # it has just ended
                    signal.pidfd_send_signal(worker.pidfd, signum)

    def _kill(self) -> None:
        for worker in self._workers:
            if worker.pid:
                log.warning("worker killed", worker=worker.index, pid=worker.pid, grace=self._grace)
        self._pass_on(signal.SIGKILL)

    def _stop_if_alone(self) -> None:
        if not any(worker.pid for worker in self._workers):
            self._loop.stop()

    def _fork(self, index: int) -> int:
        _flush()  # or both would write what waits there
        parent = os.getpid()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING + _HARMLESS)
        try:
            pid = os.fork()
            if pid == 0:
                self._work(index, parent, mask)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return pid

    def _work(self, index: int, parent: int, mask: set[signal.Signals | int]) -> NoReturn:
        """The child, which must not come back into the parent's frames."""
        status = 1
        try:
            process.die_with(parent)
            os.setsid()
            self._let_go()
            for signum in _ENDING:
                signal.signal(signum, signal.SIG_DFL)
            for signum in _HARMLESS:
                signal.signal(signum, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            status = self._serve(index, partial(self._tell_parent, index))
        except OSError as error:
            log.error("worker failed", worker=index, error=str(error))
        except BaseException:
            traceback.print_exc()
        finally:
            _flush()
            os._exit(status)

    def _tell_parent(self, index: int) -> None:
        with suppress(BrokenPipeError):  # it is gone; the signal that says so is on its way
            os.write(self._telling, _NUMBER.pack(index))

    def _let_go(self) -> None:
        """Closes what is the parent's."""
        self._loop.close()
        os.close(self._hearing)
        for worker in self._workers:
            if worker.pid:
                os.close(worker.pidfd)


def _tell_manager() -> None:
    if (problem := process.tell_ready()) is not None:
        log.warning("the service manager can't be told", error=problem)


def _how_it_ended(status: int) -> dict[str, object]:
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return {"status": code}
    try:
        return {"signal": signal.Signals(-code).name}
    except ValueError:  # most real-time signals have no name
        return {"signal": -code}


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # gone, closed, or None from the start
            stream.flush()


def _ignored() -> None:
    """There is nothing to read again."""
