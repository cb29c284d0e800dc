"""Waiting against a model: any who come, go and come again, on a clock that this file turns."""

from collections.abc import Callable
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.loop import Loop
from tcp_relay.engine.timeouts import FixedTimeoutQueue

SECONDS = 10.0


class Clock:
    """As much of a loop as is needed."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], object]]] = []

    def call_at(self, when: float, fn: Callable[[], object]) -> None:
        assert when > self.now - SECONDS
        self.timers.append((when, fn))

    def turn_to(self, now: float) -> None:
        """As the loop does: late, and in one turn all that is due."""
        self.now = now
        while due := [timer for timer in self.timers if timer[0] <= now]:
            self.timers.remove(min(due, key=lambda timer: timer[0]))
            min(due, key=lambda timer: timer[0])[1]()


class Rig:
    def __init__(self) -> None:
        self.clock = Clock()
        self.late: list[int] = []
        self.waiting = FixedTimeoutQueue[int](cast(Loop, self.clock), SECONDS, self.late.append)


acts = st.lists(
    st.tuples(st.sampled_from(["add", "discard"]), st.integers(0, 4), st.integers(0, 8)),
    max_size=60,
)


@given(script=acts)
def test_who_has_waited_so_long_is_told_once_and_nobody_else(
    script: list[tuple[str, int, int]],
) -> None:
    rig = Rig()
    since: dict[int, float] = {}
    expected: list[int] = []
    for act, who, pause in script:
        if act == "add":
            rig.waiting.add(who)
            since.pop(who, None)
            since[who] = rig.clock.now
        else:
            rig.waiting.discard(who)
            since.pop(who, None)
        rig.clock.turn_to(rig.clock.now + pause)
        for late in [one for one in since if since[one] + SECONDS <= rig.clock.now]:
            del since[late]
            expected.append(late)
        assert rig.late == expected
        assert all((one in rig.waiting) is (one in since) for one in range(5))
        assert len(rig.clock.timers) <= 1  # however many wait
        assert rig.clock.timers or not since


def test_nobody_is_told_before_his_time() -> None:
    rig = Rig()
    rig.waiting.add(1)
    rig.clock.turn_to(9.99)
    assert rig.late == []
    rig.clock.turn_to(10.0)
    assert rig.late == [1]
    assert rig.clock.timers == []


def test_who_begins_anew_waits_the_whole_time_again() -> None:
    rig = Rig()
    rig.waiting.add(1)
    rig.clock.turn_to(6.0)
    rig.waiting.add(1)
    rig.clock.turn_to(15.0)
    assert rig.late == []
    rig.clock.turn_to(16.0)
    assert rig.late == [1]


def test_one_who_is_told_may_take_others_away_and_wait_again() -> None:
    clock = Clock()
    told: list[str] = []

    def expired(who: str) -> None:
        told.append(who)
        waiting.discard("b")
        if told == ["a"]:
            waiting.add("a")

    waiting = FixedTimeoutQueue[str](cast(Loop, clock), SECONDS, expired)
    waiting.add("a")
    waiting.add("b")
    clock.turn_to(10.0)
    assert told == ["a"]
    clock.turn_to(20.0)
    assert told == ["a", "a"]
    assert clock.timers == []


@given(st.floats(0, 1e7), st.floats(1e-3, 1e5))
def test_when_the_timer_is_due_somebody_is_late_however_sums_are_rounded(
    began: float, seconds: float
) -> None:
    """Or it would be set to the same instant again and again, and the loop never got on."""
    clock, late = Clock(), list[int]()
    waiting = FixedTimeoutQueue[int](cast(Loop, clock), seconds, late.append)
    clock.now = began
    waiting.add(1)
    ((when, look),) = clock.timers
    clock.now = when
    look()

    assert late == [1]


def test_a_call_that_fails_takes_nobody_elses_turn() -> None:
    clock, late = Clock(), list[int]()

    def expired(who: int) -> None:
        late.append(who)
        if who == 1:
            raise OSError("failed")

    waiting = FixedTimeoutQueue[int](cast(Loop, clock), SECONDS, expired)
    for who in (1, 2, 3):
        waiting.add(who)
    with pytest.raises(OSError, match="failed"):
        clock.turn_to(SECONDS)
    clock.turn_to(SECONDS)

    assert late == [1, 2, 3]
