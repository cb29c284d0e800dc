"""Two halves: what the loss of a socket means for them, when both are done, and what is overdue."""

from collections.abc import Callable

import pytest

from tcp_relay.engine.channel import Channel, Todo
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.session import End, Session, SessionSide

LIMITS = SessionLimits(stall=10.0, half_close=100.0)


@pytest.mark.parametrize("side", list(SessionSide))
def test_a_side_feeds_one_half_and_drains_the_other(side: SessionSide) -> None:
    pair = Session()
    feeds, drains = (pair.down, pair.up) if side is SessionSide.SERVER else (pair.up, pair.down)
    assert pair.fed_by(side) is feeds
    assert pair.drained_by(side) is drains


def test_it_has_ended_when_both_ends_of_file_were_passed_on() -> None:
    pair = Session()
    for half, ended in ((pair.down, False), (pair.up, True)):
        half.got(0, asked=1, now=1.0)
        assert not pair.ended
        assert pair.is_half_closed is ended
        half.shut(now=2.0)
        assert pair.ended is ended
        assert pair.is_half_closed is not ended
    assert pair.at == 2.0


@pytest.mark.parametrize("side", list(SessionSide))
def test_a_lost_side_still_has_what_it_said_delivered_and_then_its_reset(side: SessionSide) -> None:
    pair = Session()
    said, unheard = pair.fed_by(side), pair.drained_by(side)
    said.hold(b"last words")
    unheard.hold(b"for nobody")
    assert pair.held == 20
    pair.lost(side, now=3.0)
    assert pair.held == 10
    assert pair.is_resetting
    assert said.todo() is Todo.WAIT
    assert said.at == 3.0
    assert unheard.todo() is Todo.WAIT
    said.writable = True
    said.sent(10, now=4.0)
    assert said.todo() is Todo.RESET
    assert not pair.ended


@pytest.mark.parametrize("lost", list(SessionSide))
def test_a_reset_is_owed_also_after_both_ends_of_file(lost: SessionSide) -> None:
    pair = Session()
    for half in (pair.up, pair.down):
        half.got(0, asked=1, now=1.0)
        half.shut(now=1.0)
    pair.lost(lost, now=2.0)
    assert not pair.ended
    assert pair.fed_by(lost).todo() is Todo.RESET


def holding(half: Channel, at: float) -> None:
    half.hold(b"x")
    half.at = at


def finished(half: Channel, at: float) -> None:
    half.got(0, asked=1, now=at)
    half.shut(now=at)


def idle(pair: Session) -> None:
    pair.up.at = pair.down.at = 1.0


def stalled(pair: Session) -> None:
    holding(pair.down, at=5.0)
    pair.up.at = 14.0  # that the other direction moves doesn't help


def stalled_twice(pair: Session) -> None:
    holding(pair.up, at=7.0)
    holding(pair.down, at=6.0)


def half_closed(pair: Session) -> None:
    finished(pair.up, at=2.0)
    pair.down.at = 4.0  # it goes on


def half_closed_and_stalled(pair: Session) -> None:
    finished(pair.up, at=2.0)
    holding(pair.down, at=3.0)


def both_finished(pair: Session) -> None:
    finished(pair.up, at=2.0)
    finished(pair.down, at=2.0)


def unheard_end(pair: Session) -> None:
    pair.up.got(0, asked=1, now=2.0)  # not passed on yet


def resetting(pair: Session) -> None:
    holding(pair.up, at=2.0)
    pair.lost(SessionSide.CLIENT, now=8.0)


@pytest.mark.parametrize(
    ("facts", "due", "end"),
    [
        (idle, None, None),
        (unheard_end, None, None),
        (both_finished, None, None),
        (stalled, 15.0, End.STALLED),
        (stalled_twice, 16.0, End.STALLED),
        (half_closed, 104.0, End.FORGOTTEN),
        (half_closed_and_stalled, 13.0, End.STALLED),
        (resetting, 18.0, End.RESET),
    ],
)
def test_what_waits_too_long_is_overdue_and_nothing_else(
    facts: Callable[[Session], None], due: float | None, end: End | None
) -> None:
    pair = Session()
    facts(pair)
    assert pair.deadline(LIMITS) == due
    if due is None:
        assert pair.overdue(1e9, LIMITS) is None
    else:
        assert pair.overdue(due - 0.001, LIMITS) is None
        assert pair.overdue(due, LIMITS) is end


def test_what_may_be_overdue_is_guarded() -> None:
    """The pump asks for these two, and sets no timer otherwise."""
    for facts in (idle, stalled, stalled_twice, half_closed, half_closed_and_stalled, resetting):
        pair = Session()
        facts(pair)
        assert (pair.may_stall or pair.is_half_closed) is (pair.deadline(LIMITS) is not None)


def test_a_half_closed_pair_with_held_bytes_is_stalled_only_after_the_stall_limit() -> None:
    limits = SessionLimits(stall=10.0, half_close=1.0)
    pair = Session()
    half_closed_and_stalled(pair)
    assert pair.overdue(5.0, limits) is not End.STALLED
    assert pair.overdue(13.0, limits) is not None


def test_a_pair_is_smooth_if_both_halves_are() -> None:
    pair = Session()
    pair.up.writable = True
    assert not pair.is_smooth
    pair.down.writable = True
    assert pair.is_smooth
