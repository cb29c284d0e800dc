"""The loop: who is called, when, and who no more."""

import errno
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from knet.loop import MAX_EVENTS, PAUSE, Loop, Timer
from tests.tools.hours import Clock, Poll, simulated


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture
def pairs() -> Iterator[list[tuple[socket.socket, socket.socket]]]:
    pairs = [socket.socketpair() for _ in range(3)]
    yield pairs
    for pair in pairs:
        for end in pair:
            end.close()


Pairs = list[tuple[socket.socket, socket.socket]]


def turn(loop: Loop) -> None:
    """One turn that finds what is ready now."""
    loop.call_soon(lambda: loop.call_soon(loop.stop))  # the first call comes before the first wait
    loop.run()


def test_a_handler_gets_the_events_of_its_descriptor(loop: Loop, pairs: Pairs) -> None:
    got: list[tuple[int, int]] = []

    def note(number: int, events: int) -> None:
        got.append((number, events))

    for number, (one, _) in enumerate(pairs):
        loop.add(one.fileno(), select.EPOLLIN, partial(note, number))
    pairs[1][1].send(b"x")
    turn(loop)
    assert got == [(1, select.EPOLLIN)]


def test_an_edge_is_told_once_and_a_level_until_it_is_gone(loop: Loop, pairs: Pairs) -> None:
    edges: list[int] = []
    levels: list[int] = []
    loop.add(pairs[0][0].fileno(), select.EPOLLIN | select.EPOLLET, edges.append)
    loop.add(pairs[1][0].fileno(), select.EPOLLIN, levels.append)
    pairs[0][1].send(b"x")
    pairs[1][1].send(b"x")
    for _ in range(3):
        turn(loop)
    assert len(edges) == 1
    assert len(levels) == 3


def test_a_mask_can_be_changed(loop: Loop, pairs: Pairs) -> None:
    got: list[int] = []
    sock = pairs[0][0]
    loop.add(sock.fileno(), select.EPOLLIN, got.append)
    turn(loop)
    assert got == []
    loop.modify(sock.fileno(), select.EPOLLOUT)
    turn(loop)
    assert set(got) == {select.EPOLLOUT}


def test_another_handler_has_the_events_from_the_same_batch_on(loop: Loop, pairs: Pairs) -> None:
    """And no event is lost or told twice: the registration stays as it is."""
    got: list[str] = []
    one, other = pairs[0][0].fileno(), pairs[1][0].fileno()

    def exchange(mine: int, its: int) -> None:
        got.append(f"first {mine == one}")
        loop.set_handler(mine, lambda _: got.append("its own, later"))
        loop.set_handler(its, lambda _: got.append("the other's"))

    loop.add(one, select.EPOLLIN | select.EPOLLET, lambda _: exchange(one, other))
    loop.add(other, select.EPOLLIN | select.EPOLLET, lambda _: exchange(other, one))
    for _, end in pairs[:2]:
        end.send(b"x")
    turn(loop)
    assert got[1:] == ["the other's"]
    pairs[0][1].send(b"x")
    pairs[1][1].send(b"x")
    turn(loop)
    assert sorted(got[2:]) == ["its own, later", "the other's"]


def test_who_is_removed_gets_nothing_more_of_the_same_batch(loop: Loop, pairs: Pairs) -> None:
    called: list[int] = []

    def only_one(number: int, _: int) -> None:
        called.append(number)
        for other, (sock, _peer) in enumerate(pairs):
            if other != number:
                loop.remove(sock.fileno())

    for number, (end, peer) in enumerate(pairs):
        loop.add(end.fileno(), select.EPOLLIN, partial(only_one, number))
        peer.send(b"x")
    turn(loop)
    assert len(called) == 1


def test_a_reused_number_doesnt_inherit_the_old_ones_event(loop: Loop) -> None:
    # Both are ready in one batch; the first replaces the other by a quiet file of its number.
    ends = [socket.socketpair() for _ in range(2)]
    called: list[str] = []
    spare: list[socket.socket] = []

    def replace(number: int, _: int) -> None:
        called.append("old")
        other = ends[1 - number][0]
        fd = other.fileno()
        loop.remove(fd)
        quiet, peer = socket.socketpair()
        os.dup2(quiet.fileno(), fd)  # closes the old file and takes its number
        loop.add(fd, select.EPOLLIN, lambda _: called.append("new"))
        loop.remove(ends[number][0].fileno())
        spare.extend((quiet, peer))

    for number, (one, two) in enumerate(ends):
        loop.add(one.fileno(), select.EPOLLIN, partial(replace, number))
        two.send(b"x")
    turn(loop)
    assert called == ["old"]
    spare[1].send(b"now")
    turn(loop)
    assert called[:2] == ["old", "new"]  # what it has to say itself is heard
    for sock in (*spare, *ends[0], *ends[1]):
        sock.close()


def test_a_number_removed_between_batches_can_be_used_at_once(loop: Loop, pairs: Pairs) -> None:
    got: list[int] = []
    sock = pairs[0][0]

    def saw(events: int) -> None:
        got.append(events)
        loop.call_at(loop.now + 0.02, loop.stop)  # it is told no second time

    loop.add(sock.fileno(), select.EPOLLIN | select.EPOLLET, saw)
    pairs[0][1].send(b"x")

    def again() -> None:
        loop.remove(sock.fileno())
        loop.add(sock.fileno(), select.EPOLLIN | select.EPOLLET, saw)

    loop.call_soon(again)
    loop.call_at(time.monotonic() + 30, loop.stop)
    loop.run()
    assert got == [select.EPOLLIN]


def test_a_descriptor_is_registered_once(loop: Loop, pairs: Pairs) -> None:
    loop.add(pairs[0][0].fileno(), select.EPOLLIN, lambda _: None)
    with pytest.raises(FileExistsError):
        loop.add(pairs[0][0].fileno(), select.EPOLLIN, lambda _: None)


def test_timers_fire_in_order_and_never_early(loop: Loop) -> None:
    fired: list[tuple[str, bool]] = []
    start = loop.now

    def at(name: str, delay: float) -> None:
        when = start + delay
        loop.call_at(when, lambda: fired.append((name, loop.now >= when)))

    for name, delay in (("c", 0.02), ("a", 0.0), ("d", 0.02), ("b", 0.01)):
        at(name, delay)
    loop.call_at(start + 0.03, loop.stop)
    loop.run()
    assert fired == [("a", True), ("b", True), ("c", True), ("d", True)]


def test_a_cancelled_timer_doesnt_fire(loop: Loop) -> None:
    fired: list[str] = []
    timer = loop.call_at(loop.now, lambda: fired.append("cancelled"))
    other = loop.call_at(loop.now, lambda: fired.append("kept"))
    timer.cancel()
    timer.cancel()
    assert not timer.pending
    turn(loop)
    assert fired == ["kept"]
    assert not other.pending
    other.cancel()


def test_cancelled_timers_dont_pile_up(loop: Loop) -> None:
    fired: list[int] = []
    kept: list[Timer] = []
    for number in range(1000):
        kept.append(loop.call_at(loop.now + 0.001, partial(fired.append, number)))
        for _ in range(10):
            loop.call_at(loop.now + 1000, loop.stop).cancel()
    assert len(loop._timers) < 2 * 1000 + 130
    loop.call_at(loop.now + 0.002, loop.stop)
    loop.run()
    assert fired == list(range(1000))


def test_a_call_soon_from_a_call_soon_is_for_the_next_turn(loop: Loop, pairs: Pairs) -> None:
    order: list[str] = []
    loop.add(pairs[0][0].fileno(), select.EPOLLIN, lambda _: order.append("event"))
    pairs[0][1].send(b"x")

    def again() -> None:
        order.append("soon")
        if len(order) < 6:
            loop.call_soon(again)
        else:
            loop.stop()

    loop.call_soon(again)
    loop.run()
    assert order == ["soon", "event", "soon", "event", "soon", "event", "soon"]


def test_an_exception_leaves_run_and_loses_nothing_else(loop: Loop, pairs: Pairs) -> None:
    got: list[int] = []

    def handler(number: int, _: int) -> None:
        got.append(number)
        if len(got) == 1:
            raise RuntimeError("a bug")

    edge = select.EPOLLIN | select.EPOLLET
    for number, (one, two) in enumerate(pairs):
        loop.add(one.fileno(), edge, partial(handler, number))
        two.send(b"x")
    with pytest.raises(RuntimeError):
        loop.run()
    turn(loop)
    assert sorted(got) == [0, 1, 2]


def test_now_is_read_once_per_turn(loop: Loop) -> None:
    seen: list[float] = []
    for _ in range(2):
        loop.call_soon(lambda: seen.append(loop.now))
    loop.call_soon(loop.stop)
    loop.run()
    assert seen[0] == seen[1] <= time.monotonic()


def test_signals_are_told_by_the_loop_and_put_back(loop: Loop) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    told: list[int] = []

    def usr1() -> None:
        told.append(signal.SIGUSR1)
        loop.stop()

    loop.on_signal(signal.SIGUSR1, usr1)
    loop.on_signal(signal.SIGUSR2, lambda: told.append(signal.SIGUSR2))
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGUSR1)
    assert told == []
    loop.run()
    assert sorted(told) == sorted([signal.SIGUSR1, signal.SIGUSR2])
    loop.close()
    assert signal.getsignal(signal.SIGUSR1) == before
    assert signal.set_wakeup_fd(-1) == -1


def test_closing_leaves_no_descriptor(pairs: Pairs) -> None:
    before = len(os.listdir("/proc/self/fd"))
    loop = Loop()
    loop.on_signal(signal.SIGUSR1, loop.stop)
    loop.add(pairs[0][0].fileno(), select.EPOLLIN, lambda _: None)
    loop.close()
    loop.close()
    assert len(os.listdir("/proc/self/fd")) == before
    assert pairs[0][0].fileno() >= 0


def test_oserrors_are_told_and_the_loop_goes_on_behind_them(loop: Loop, pairs: Pairs) -> None:
    told: list[int | None] = []
    got: list[int] = []
    loop.on_failure = lambda error: told.append(error.errno)

    def fails(number: int) -> None:
        got.append(number)
        raise OSError(number, "failed")

    edge = select.EPOLLIN | select.EPOLLET
    for number, (one, two) in zip((errno.EIO, errno.EROFS), pairs, strict=False):
        loop.add(one.fileno(), edge, lambda _, number=number: fails(number))  # type: ignore[misc]
        two.send(b"x")
    loop.call_at(loop.now, lambda: fails(errno.ENOMEM))
    loop.call_soon(lambda: fails(errno.EMFILE))
    for _ in range(5):
        turn(loop)

    assert told == got
    assert set(got) == {errno.ENOMEM, errno.EMFILE, errno.EIO, errno.EROFS}


class FailingOnce:
    """An epoll object of which one method fails, the first time."""

    def __init__(self, loop: Loop, method: str) -> None:
        self._epoll, self._method = loop._epoll, method

    def __getattr__(self, name: str) -> Any:
        if name != self._method:
            return getattr(self._epoll, name)
        self._method = ""
        return self._fails

    def _fails(self, *_: object) -> None:
        raise OSError(errno.ENOMEM, "no memory")


def test_a_wait_that_fails_once_loses_nothing(loop: Loop, pairs: Pairs) -> None:
    told: list[int | None] = []
    loop.on_failure = lambda error: told.append(error.errno)
    one, two = pairs[0]
    loop.add(one.fileno(), select.EPOLLIN, lambda _: loop.stop())
    two.send(b"x")
    loop._epoll = FailingOnce(loop, "poll")  # type: ignore[assignment]
    loop.run()

    assert told == [errno.ENOMEM]


def test_an_oserror_of_a_loop_without_anybody_to_tell_leaves_run(loop: Loop) -> None:
    def fails() -> None:
        raise OSError(errno.EIO, "failed")

    loop.call_soon(fails)
    with pytest.raises(OSError, match="failed"):
        loop.run()


def test_a_failure_that_repeats_takes_no_whole_core(loop: Loop, pairs: Pairs) -> None:
    one, two = pairs[0]
    told = 0

    def tell(_: OSError) -> None:
        nonlocal told
        told += 1

    def fails(_: int) -> None:
        raise OSError(errno.EIO, "failed")

    loop.on_failure = tell
    loop.add(one.fileno(), select.EPOLLIN, fails)
    two.send(b"x")
    loop.call_at(loop.now + 0.1, loop.stop)
    loop.run()

    assert 1 < told <= 0.1 / PAUSE + 2


def test_a_descriptor_is_let_go_although_the_first_try_fails(loop: Loop, pairs: Pairs) -> None:
    one, _ = pairs[0]
    loop.add(one.fileno(), select.EPOLLIN, lambda _: None)
    loop._epoll = FailingOnce(loop, "unregister")  # type: ignore[assignment]
    loop.remove(one.fileno())
    loop.add(one.fileno(), select.EPOLLIN, lambda _: None)


def test_a_descriptor_that_could_not_be_registered_can_be_removed(loop: Loop, pairs: Pairs) -> None:
    one, two = pairs[0]
    epoll = loop._epoll
    loop._epoll = FailingOnce(loop, "register")  # type: ignore[assignment]
    with pytest.raises(OSError, match="no memory"):
        loop.add(one.fileno(), select.EPOLLIN, lambda _: None)
    loop.remove(one.fileno())
    loop._epoll = epoll
    got: list[int] = []
    loop.add(one.fileno(), select.EPOLLIN, got.append)
    two.send(b"x")
    turn(loop)
    assert got == [select.EPOLLIN]


STOP = 13.0
"""Seconds for which this process stands still."""


class Stopped(Poll):
    """A wait in which the process is stopped, the first time."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(clock)
        self._stop = STOP

    def poll(self, timeout: float, maxevents: int) -> list[tuple[int, int]]:
        """As Poll's."""
        events = super().poll(timeout, maxevents)
        self._clock.now += self._stop
        self._stop = 0.0
        return events


@pytest.mark.parametrize("where", ["in a wait", "in a handler", "in a call", "in a timer"])
def test_no_timer_counts_the_seconds_in_which_the_process_stood_still(
    pairs: Pairs, where: str
) -> None:
    absences: list[float] = []
    with simulated() as loop:
        poll = loop._epoll
        assert isinstance(poll, Poll)
        clock = poll._clock

        def stop() -> None:
            clock.now += STOP

        began, real = loop.now, clock.now
        if where == "in a wait":
            loop._epoll = Stopped(clock)
        elif where == "in a call":
            loop.call_soon(stop)
        elif where == "in a timer":
            loop.call_at(loop.now + 0.5, stop)
        else:
            one, other = pairs[0]
            other.send(b"x")
            loop.add(one.fileno(), select.EPOLLIN | select.EPOLLET, lambda _: stop())
        loop.on_absence = absences.append
        loop.call_at(loop.now + 10, loop.stop)
        loop.run()

        assert 10 <= loop.now - began < 12
        more = 10 if where == "in a wait" else 0  # the wait before counts neither
        assert STOP + 10 <= clock.now - real < STOP + 12 + more
        assert loop.absent == sum(absences)
        assert STOP <= sum(absences) < STOP + 2 + more


def test_who_was_long_in_the_making_and_who_has_no_timer_did_not_stand_still() -> None:
    with simulated() as loop:
        poll = loop._epoll
        assert isinstance(poll, Poll)
        poll._clock.now += STOP
        loop.call_soon(loop.stop)
        loop.run()
        assert loop.now == poll._clock.now
        assert loop.absent == 0


def test_what_waited_meanwhile_is_handled_before_any_timer() -> None:
    """Also what doesn't come at once."""
    order: list[str] = []
    pairs = [socket.socketpair() for _ in range(MAX_EVENTS + 44)]
    with simulated() as loop, ExitStack() as stack:
        for pair in pairs:
            for end in pair:
                stack.enter_context(end)

            def read(_: int, end: socket.socket = pair[0]) -> None:
                end.recv(1)
                order.append("event")

            loop.add(pair[0].fileno(), select.EPOLLIN, read)
        poll = loop._epoll
        assert isinstance(poll, Poll)
        clock = poll._clock

        def stop() -> None:
            clock.now += STOP
            for _, other in pairs:
                other.send(b"x")
            loop.call_at(loop.now + 0.1, fire)  # its time is over, and yet it waits

        def fire() -> None:
            order.append("timer")
            loop.stop()

        loop.call_at(loop.now + 0.5, stop)
        loop.run()
    assert order == ["event"] * len(pairs) + ["timer"]


def test_a_stopped_process_finds_its_timers_as_they_were() -> None:
    """SIGSTOP, in earnest."""
    code = """if True:
        import time
        from knet.loop import Loop
        with Loop() as loop:
            began, real = loop.now, time.monotonic()
            loop.call_at(began + 2.5, loop.stop)
            loop.call_soon(lambda: print("ready", flush=True))
            loop.run()
            print(loop.now - began, time.monotonic() - real, loop.absent)
    """
    program = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with program:
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGSTOP)
        time.sleep(4)
        program.send_signal(signal.SIGCONT)
        counted, passed, absent = map(float, program.communicate(timeout=20)[0].split())
    assert program.returncode == 0
    assert counted >= 2.5
    assert passed >= 6
    assert counted + absent == pytest.approx(passed, abs=0.1)


def test_a_file_whose_close_failed_ends_nothing(loop: Loop, pairs: Pairs) -> None:
    """Nobody has its events any more, and no later one comes."""
    heard: list[int] = []
    loop.add(pairs[0][0].fileno(), select.EPOLLIN, heard.append)
    loop.add(pairs[1][0].fileno(), select.EPOLLIN, heard.append)
    loop.closing(pairs[0][0].fileno())  # and then it isn't closed
    turn(loop)
    for _, other in pairs:
        other.send(b"x")
    turn(loop)
    assert heard == [select.EPOLLIN]
    assert loop._epoll.poll(0, 10) == [(pairs[1][0].fileno(), select.EPOLLIN)]
