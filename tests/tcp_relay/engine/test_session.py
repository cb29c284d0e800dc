"""Two channels: what the loss of a socket means for them, when both are done, what is overdue."""

from collections.abc import Callable

import pytest

from tcp_relay.engine.channel import Channel, Todo
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.session import End, Session, SessionSide

LIMITS = SessionLimits(stall=10.0, half_close=100.0)


@pytest.mark.parametrize("side", list(SessionSide))
def test_a_side_feeds_one_channel_and_drains_the_other(side: SessionSide) -> None:
    session = Session()
    feeds, drains = (
        (session.down, session.up) if side is SessionSide.SERVER else (session.up, session.down)
    )
    assert session.fed_by(side) is feeds
    assert session.drained_by(side) is drains


def test_it_has_ended_when_both_ends_of_file_were_passed_on() -> None:
    session = Session()
    for channel, ended in ((session.down, False), (session.up, True)):
        channel.got(0, asked=1, now=1.0)
        assert not session.ended
        assert session.is_channel_closed is ended
        channel.shut(now=2.0)
        assert session.ended is ended
        assert session.is_channel_closed is not ended
    assert session.at == 2.0


@pytest.mark.parametrize("side", list(SessionSide))
def test_a_lost_side_still_has_what_it_said_delivered_and_then_its_reset(side: SessionSide) -> None:
    session = Session()
    said, unheard = session.fed_by(side), session.drained_by(side)
    said.hold(b"last words")
    unheard.hold(b"for nobody")
    assert session.held == 20
    session.lost(side, now=3.0)
    assert session.held == 10
    assert session.is_resetting
    assert said.todo() is Todo.WAIT
    assert said.at == 3.0
    assert unheard.todo() is Todo.WAIT
    said.writable = True
    said.sent(10, now=4.0)
    assert said.todo() is Todo.RESET
    assert not session.ended


@pytest.mark.parametrize("lost", list(SessionSide))
def test_a_reset_is_owed_also_after_both_ends_of_file(lost: SessionSide) -> None:
    session = Session()
    for channel in (session.up, session.down):
        channel.got(0, asked=1, now=1.0)
        channel.shut(now=1.0)
    session.lost(lost, now=2.0)
    assert not session.ended
    assert session.fed_by(lost).todo() is Todo.RESET


def holding(channel: Channel, at: float) -> None:
    channel.hold(b"x")
    channel.at = at


def finished(channel: Channel, at: float) -> None:
    channel.got(0, asked=1, now=at)
    channel.shut(now=at)


def idle(session: Session) -> None:
    session.up.at = session.down.at = 1.0


def stalled(session: Session) -> None:
    holding(session.down, at=5.0)
    session.up.at = 14.0  # that the other direction moves doesn't help


def stalled_twice(session: Session) -> None:
    holding(session.up, at=7.0)
    holding(session.down, at=6.0)


def half_closed(session: Session) -> None:
    finished(session.up, at=2.0)
    session.down.at = 4.0  # it goes on


def channel_closed_and_stalled(session: Session) -> None:
    finished(session.up, at=2.0)
    holding(session.down, at=3.0)


def both_finished(session: Session) -> None:
    finished(session.up, at=2.0)
    finished(session.down, at=2.0)


def unheard_end(session: Session) -> None:
    session.up.got(0, asked=1, now=2.0)  # not passed on yet


def resetting(session: Session) -> None:
    holding(session.up, at=2.0)
    session.lost(SessionSide.CLIENT, now=8.0)


@pytest.mark.parametrize(
    ("facts", "due", "end"),
    [
        (idle, None, None),
        (unheard_end, None, None),
        (both_finished, None, None),
        (stalled, 15.0, End.STALLED),
        (stalled_twice, 16.0, End.STALLED),
        (half_closed, 104.0, End.FORGOTTEN),
        (channel_closed_and_stalled, 13.0, End.STALLED),
        (resetting, 18.0, End.RESET),
    ],
)
def test_what_waits_too_long_is_overdue_and_nothing_else(
    facts: Callable[[Session], None], due: float | None, end: End | None
) -> None:
    session = Session()
    facts(session)
    assert session.deadline(LIMITS) == due
    if due is None:
        assert session.overdue(1e9, LIMITS) is None
    else:
        assert session.overdue(due - 0.001, LIMITS) is None
        assert session.overdue(due, LIMITS) is end


def test_what_may_be_overdue_is_guarded() -> None:
    """The pump asks for these two, and sets no timer otherwise."""
    for facts in (idle, stalled, stalled_twice, half_closed, channel_closed_and_stalled, resetting):
        session = Session()
        facts(session)
        assert (session.may_stall or session.is_channel_closed) is (
            session.deadline(LIMITS) is not None
        )


def test_a_channel_closed_session_with_held_bytes_is_stalled_only_after_the_stall_limit() -> None:
    limits = SessionLimits(stall=10.0, half_close=1.0)
    session = Session()
    channel_closed_and_stalled(session)
    assert session.overdue(5.0, limits) is not End.STALLED
    assert session.overdue(13.0, limits) is not None


def test_a_session_is_smooth_if_both_channels_are() -> None:
    session = Session()
    session.up.writable = True
    assert not session.is_smooth
    session.down.writable = True
    assert session.is_smooth


@pytest.mark.parametrize("side", list(SessionSide))
def test_an_overdue_session_says_which_side_and_why(side: SessionSide) -> None:
    other = SessionSide.CLIENT if side else SessionSide.SERVER
    stalled, forgotten, lost = Session(), Session(), Session()
    stalled.drained_by(side).hold(b"12345")
    forgotten.fed_by(side).shut(now=0.0)
    lost.lost(side, 0.0, f"{side}: connection reset by peer")
    lost.drained_by(other).hold(b"67")

    assert [
        session.overdue_in_words(end, LIMITS)
        for session, end in (
            (stalled, End.STALLED),
            (forgotten, End.FORGOTTEN),
            (lost, End.RESET),
        )
    ] == [
        f"the {side} took none of 5 bytes for 10 s",
        f"the {side} has finished, and nothing came for 100 s",
        f"{side}: connection reset by peer",
    ]
