"""Counters under the names that krelay knows, and the table that people read."""

import pytest

from krelay.registration.messages import COUNTERS, MAX_COUNTS, Report, emit, parse_request
from tcp_relay.engine.channel import Channel
from tcp_relay.engine.counts import Counts, Row, state_of, table
from tcp_relay.engine.session import End, Session

ROW = Row("10.0.0.1:40000", "192.168.0.1:80", "open", 12.34, 0.04, 5, 70000, "0/512")


def test_the_names_are_those_that_krelay_knows() -> None:
    assert tuple(Counts().as_dict()) == COUNTERS


def test_a_report_of_them_can_be_told() -> None:
    counts = {"open": 1, "held": 2, **Counts().as_dict()}
    assert len(counts) <= MAX_COUNTS
    report = Report("0123abcd", counts)
    assert parse_request(emit(report)) == report


@pytest.mark.parametrize("end", list(End))
def test_each_end_is_counted_under_its_own_name(end: End) -> None:
    counts = Counts()
    counts.ended(end)
    counts.ended(end)
    told = counts.as_dict()
    assert told.pop(str(end)) == 2
    assert set(told.values()) == {0}


def test_bytes_are_counted_by_where_they_came_from() -> None:
    counts = Counts(moved=[3, 4])
    assert (counts.as_dict()["from_client"], counts.as_dict()["from_server"]) == (3, 4)


def finished(up: bool, down: bool) -> Session:
    return Session(Channel(got_eof=up), Channel(got_eof=down))


@pytest.mark.parametrize(
    ("session", "is_connected", "state"),
    [
        (Session(), False, "connecting"),
        (finished(True, False), False, "connecting"),
        (Session(), True, "open"),
        (finished(True, False), True, "client finished"),
        (finished(False, True), True, "server finished"),
        (finished(True, True), True, "closing"),
        (Session(Channel(got_eof=True, got_reset=True), Channel(got_eof=True)), True, "resetting"),
    ],
)
def test_a_state_is_said_in_a_word_or_two(session: Session, is_connected: bool, state: str) -> None:
    assert state_of(session, is_connected) == state


def test_the_table_has_a_line_for_each_and_a_line_of_totals() -> None:
    counts = Counts(accepted=3, opened=2, moved=[5, 70000])
    counts.ended(End.STALLED)
    text = table([ROW, ROW._replace(client="1.2.3.4:5", server="-", state="connecting")], counts)
    assert text == (
        "CLIENT          SERVER          STATE       AGE   IDLE  FROM CLIENT  FROM SERVER  HELD\n"
        "10.0.0.1:40000  192.168.0.1:80  open        12.3  0.0   5            70000        0/512\n"
        "1.2.3.4:5       -               connecting  12.3  0.0   5            70000        0/512\n"
        "open=2 accepted=3 opened=2 stalled=1 from_client=5 from_server=70000\n"
    )


def test_the_table_of_nobody_has_a_head_and_totals() -> None:
    lines = table([], Counts()).splitlines()
    assert lines[0].split() == [
        *("CLIENT", "SERVER", "STATE", "AGE", "IDLE"),
        *("FROM", "CLIENT", "FROM", "SERVER", "HELD"),
    ]
    assert lines[1:] == ["open=0"]
