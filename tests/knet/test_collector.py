"""The collector runs when memory can't be accounted for, and never else."""

import gc
import logging
import sys
from collections.abc import Iterator

import pytest

from knet.collector import SLACK, Collector, Growth
from tests.tools.hours import every, run_for, simulated

HOUR = 3600


@pytest.fixture(autouse=True)
def the_collector_is_put_back() -> Iterator[None]:
    yield
    gc.unfreeze()
    gc.enable()


class Circle:
    """Holds itself."""

    def __init__(self) -> None:
        self.itself = self


def test_growth_is_suspect_beyond_the_slack_and_beyond_half_of_what_is_needed() -> None:
    small, large = Growth(1000, 0), Growth(10 * SLACK, 0)

    assert [small.is_suspect(1000 + SLACK + more, 0) for more in (0, 1)] == [False, True]
    assert [large.is_suspect(15 * SLACK + more, 0) for more in (0, 1)] == [False, True]


def test_what_is_known_to_live_is_never_suspect() -> None:
    growth = Growth(1000, 0)

    assert not any(growth.is_suspect(1000 + lives, lives) for lives in range(0, 10**8, 10**6))


def test_what_was_let_go_again_is_no_reason_to_hold_as_much_later() -> None:
    growth = Growth(1000, 0)
    growth.needed(5 * SLACK, 0)
    assert not growth.is_suspect(7 * SLACK, 0)
    growth.is_suspect(1000, 0)

    assert growth.is_suspect(2 * SLACK, 0)


def test_an_hour_of_circles_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with simulated() as loop:
        collector = Collector(lambda: 0)
        before = most = sys.getallocatedblocks()

        def leak() -> None:
            nonlocal most
            for _ in range(300):
                Circle()
            most = max(most, sys.getallocatedblocks())
            collector.on_time(loop.now)

        every(loop, 1, leak)
        run_for(loop, HOUR)

    assert most - before < 1.1 * max(SLACK, before // 2)
    assert set(caplog.messages) == {"circles collected"}


def test_an_hour_without_circles_has_no_pause(caplog: pytest.LogCaptureFixture) -> None:
    kept: list[list[object]] = []
    caplog.set_level(logging.INFO)
    with simulated() as loop:
        collector = Collector(lambda: 3 * len(kept))

        def live() -> None:
            kept.extend([object()] for _ in range(1000))
            if len(kept) > SLACK:
                kept.clear()
            collector.on_time(loop.now)

        every(loop, 1, live)
        run_for(loop, HOUR)

    assert caplog.messages == []
