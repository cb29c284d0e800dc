"""How a relay daemon lives and ends; tcp-relay and tcpproxy do it alike.

SIGTERM drains: no more clients are accepted, and running connections have some time to finish.  A
second one, or Ctrl-C, ends at once.  SIGHUP loses nothing, and SIGUSR1 shows the connections.
"""

import argparse
import os
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from knet import log as logs
from knet import privileges, seccomp, syscalls
from knet.collector import Collector
from knet.log import Failures, Log
from knet.loop import Loop, Timer
from knet.privileges import Account, Cap
from knet.seccomp import FilterUnavailable
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.session import End
from tcp_relay.engine.sockets import usual_probing, usual_rto_max
from tcp_relay.service import options, workers

INTERRUPTED = 128 + signal.SIGINT

GRACE = 5.0
"""Seconds that a worker may take beyond the drain, before it is killed."""

BLOCKS_OF_A_CONNECTION = 48
"""Blocks of memory that a connection may have, with both its sockets and what waits for it."""

NEEDED, RESERVED = 12, 24
"""Descriptors for all but connections: what it takes, and what is kept where there are enough."""

log = Log("service")


class RelayService:
    """Runs `loop` until a signal ends it; `stop_accepting` is called once, when that begins."""

    def __init__(self, loop: Loop, engine: Engine, stop_accepting: Callable[[], None]) -> None:
        self._loop = loop
        self._engine = engine
        self._stop_accepting = stop_accepting
        self._draining: Timer | None = None
        self._exit_status = 0
        self._collector: Collector | None = None
        loop.on_signal(signal.SIGTERM, self._drain)
        loop.on_signal(signal.SIGINT, self._interrupt)
        loop.on_signal(signal.SIGHUP, _ignore)
        loop.on_signal(signal.SIGUSR1, self._show)

    def run(self) -> int:
        """Returns the exit status, when all connections have ended."""
        self._engine.capacity = max(1, capacity(descriptor_limit(), opened()))
        usual_probing()
        usual_rto_max()
        failures = Failures(log)
        self._loop.on_failure = lambda error: failures.tell(
            self._loop.now, "a call failed; going on", error
        )
        self._loop.on_absence = self._engine.stood_still
        self._collector = Collector(lambda: len(self._engine) * BLOCKS_OF_A_CONNECTION)
        try:
            self._loop.run()
        finally:
            if self._draining is None:
                self._stop_accepting()
            self._engine.end_all(End.KILLED, "the relay stops")
        log.info(
            "stopped", **{name: count for name, count in self._engine.report().items() if count}
        )
        return self._exit_status

    def on_time(self) -> None:
        """Something has happened that may have left something; call it as often as you like."""
        if self._collector is not None:
            self._collector.on_time(self._loop.now)

    def on_room(self) -> None:
        """A connection has ended."""
        self.on_time()
        if self._draining is not None and not self._engine:
            self._loop.stop()

    def _drain(self) -> None:
        if self._draining is not None:
            self._loop.stop()
            return
        seconds = self._engine.limits.drain
        self._stop_accepting()  # first: of those who are still accepted the first may end at once
        self._draining = self._loop.call_at(self._loop.now + seconds, self._too_late)
        if self._engine:
            log.info("draining", connections=len(self._engine), at_most=f"{seconds:g} s")
        self.on_room()

    def _too_late(self) -> None:
        seconds = self._engine.limits.drain
        self._engine.end_all(End.DRAINED, f"it outlived the drain of {seconds:g} s")
        self._loop.stop()

    def _interrupt(self) -> None:
        self._exit_status = INTERRUPTED
        self._loop.stop()

    def _show(self) -> None:
        with suppress(OSError, ValueError):  # its reader is gone, or it was never open
            sys.stderr.write(self._engine.table())
            sys.stderr.flush()


def run_program(
    name: str,
    asked: argparse.Namespace,
    serve: Callable[[SessionLimits, int, Callable[[], None]], int],
    before: Callable[[], None] = lambda: None,
    in_words: Callable[[OSError], str] = str,
    user: Account | None = None,
) -> int:
    """Runs `serve(limits, index, ready)` in as many workers as were asked for; the exit status.

    That is 0, 1 after an OSError (one line says which, `in_words`), or 130 after Ctrl-C.  `before`
    is called once, before there are workers.  They run as `user` if one is given; what relaying
    doesn't need is given up in any case: of root's capabilities that for low ports stays.
    """
    logs.set_up(asked.log_level, as_json=asked.log_json)
    limits = options.limits(asked)
    try:
        raise_descriptor_limit()
        if capacity(descriptor_limit(), opened()) < 1:
            print(f"{name}: {_too_few()}", file=sys.stderr)
            return 1
        before()
        if user is not None:
            privileges.become(user)
        else:
            privileges.give_up(keep=(Cap.NET_BIND_SERVICE,))

        def confined(index: int, ready: Callable[[], None]) -> int:
            _confine(name, asked)
            return serve(limits, index, ready)

        return workers.run(asked.workers, confined, grace=limits.drain + GRACE)
    except KeyboardInterrupt:  # before the loop took the signals over
        return INTERRUPTED
    except OSError as error:
        print(f"{name}: {in_words(error)}", file=sys.stderr)
        return 1


def _confine(name: str, asked: argparse.Namespace) -> None:
    """From now on this process, which relays, makes the calls of syscalls.py alone."""
    if asked.no_seccomp:
        return
    try:
        seccomp.load(syscalls.allowed(name), syscalls.DEADLY)
    except FilterUnavailable as error:
        log.warning("system calls aren't filtered", reason=error, fix="apt-get install libseccomp2")


def raise_descriptor_limit() -> None:
    """A connection takes two descriptors: as many as this user may have."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def descriptor_limit() -> int:
    """How many descriptors this process may have."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft != resource.RLIM_INFINITY else sys.maxsize


def opened() -> int:
    """How many descriptors this process has."""
    return len(os.listdir("/proc/self/fd")) - 1  # but for that of the folder


def capacity(limit: int, opened: int) -> int:
    """How many connections there may be at once, if so many descriptors are open already.

    Some stay in hand for all else: listeners and what they have spare, krelay's socket, the file
    tree, a look-up of a name.

    >>> capacity(1024, 10), capacity(64, 10), capacity(24, 10)
    (495, 19, 1)
    """
    return (limit - opened - max(NEEDED, min(RESERVED, limit // 4))) // 2


def _too_few() -> str:
    return (
        f"{descriptor_limit()} open files are too few, it takes {opened() + NEEDED + 2} at least; "
        "raise the limit (ulimit -n, LimitNOFILE=)"
    )


def _ignore() -> None:
    """There is nothing to read again: what can change is followed as it does."""
