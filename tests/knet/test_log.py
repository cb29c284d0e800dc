"""Log lines as people and machines read them."""

import errno
import io
import json
import logging
import os
import re
from collections.abc import Iterator
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet import log
from knet.log import MOST_KINDS, Failures, Log, Throttle
from knet.loop import Loop
from tests.tools.logs import restored


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    with restored():
        yield


def set_up(level: str = "debug", *, as_json: bool = False, journal: bool = False) -> io.StringIO:
    stream = io.StringIO()
    log.set_up(level, as_json=as_json, stream=stream, journal=journal)
    return stream


def test_a_line_is_time_level_message_and_fields() -> None:
    stream = set_up()
    Log("test").info("connection opened", client="10.0.0.1:40000", port=80, nothing=None)
    line = stream.getvalue()
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z info connection opened "
        r"client=10\.0\.0\.1:40000 port=80\n",
        line,
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("two words", '"two words"'),
        ("", '""'),
        ("a=b", '"a=b"'),
        ('say "x"', r'"say \"x\""'),
        ("line\nbreak", r'"line\nbreak"'),
        ("\N{EM DASH}", r'"\u2014"'),
        (3.25, "3.25"),
        (True, "True"),
    ],
)
def test_values_that_could_be_misread_are_quoted(value: object, text: str) -> None:
    stream = set_up(journal=True)
    Log("test").info("event", key=value)
    assert stream.getvalue() == f"<6>event key={text}\n"


def test_a_renamed_field_has_both_names_for_a_release() -> None:
    stream = set_up(journal=True)
    Log("test").info("event", fix="krelay clean", why=None)
    Log("test").info("event", fix=None)
    assert stream.getvalue() == '<6>event fix="krelay clean" mend="krelay clean"\n<6>event\n'


@given(value=st.text())
def test_any_value_stays_in_its_line_and_field(value: str) -> None:
    stream = set_up(journal=True)
    Log("test").info("event", a=value, b=1)
    [line] = stream.getvalue().splitlines()
    shown = line.removeprefix("<6>event a=").removesuffix(" b=1")
    assert (json.loads(shown) if shown.startswith('"') else shown) == value


@pytest.mark.parametrize(
    ("level", "words"),
    [
        ("debug", ["<7>d", "<6>i", "<4>w", "<3>e"]),
        ("info", ["<6>i", "<4>w", "<3>e"]),
        ("warning", ["<4>w", "<3>e"]),
        ("error", ["<3>e"]),
    ],
)
def test_levels_below_the_one_asked_for_are_left_out(level: str, words: list[str]) -> None:
    stream = set_up(level, journal=True)
    some = Log("test")
    for say, word in ((some.debug, "d"), (some.info, "i"), (some.warning, "w"), (some.error, "e")):
        say(word)
    assert stream.getvalue().split() == words
    assert some.enabled(logging.DEBUG) is (level == "debug")


def test_json_has_one_object_a_line_and_fields_cant_forge_its_head() -> None:
    stream = set_up(as_json=True)
    Log("test").warning("event", count=3, ratio=0.5, text="a\nb", message="forged", none=None)
    [line] = stream.getvalue().splitlines()
    fields = json.loads(line)
    assert fields.pop("time").endswith("Z")
    assert fields == {
        "level": "warning", "message": "event", "count": 3, "ratio": 0.5, "text": "a\nb"
    }  # fmt: skip


def test_a_second_set_up_replaces_the_first() -> None:
    first, second = set_up(), set_up()
    Log("test").info("event")
    assert first.getvalue() == ""
    assert second.getvalue().count("event") == 1


def test_the_journal_is_known_by_device_and_inode(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    with os.fdopen(reader), os.fdopen(writer, "w") as stream:
        status = os.fstat(writer)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
        assert log.is_journal(stream)
        monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino + 1}")
        assert not log.is_journal(stream)
    assert not log.is_journal(io.StringIO())


@given(
    steps=st.lists(st.floats(0, 30), max_size=50),
    interval=st.floats(0.1, 20),
)
def test_a_throttle_passes_one_an_interval_and_counts_the_rest(
    steps: list[float], interval: float
) -> None:
    throttle, now, passed, counted = Throttle(interval), 0.0, [], 0
    for step in steps:
        now += step
        if (before := throttle.admit(now)) is not None:
            passed.append(now)
            counted += before
    assert len(passed) + counted + throttle.suppressed == len(steps)
    assert all(b >= a + interval for a, b in pairwise(passed))
    assert bool(passed) == bool(steps)


def failure(number: int) -> OSError:
    """An error that was met here."""
    try:
        os.close(-1)
    except OSError as error:
        error.errno = number
        return error
    raise AssertionError


def test_failures_are_told_once_a_kind_with_the_count_of_the_others() -> None:
    out = set_up()
    failures = Failures(Log("test"), interval=10.0)
    for now in (0.0, 1.0, 2.0, 11.0):
        failures.tell(now, "it failed", failure(errno.EMFILE), file="gport")
        failures.tell(now, "it failed", failure(errno.ENOSPC), file="gport")
    lines = out.getvalue().splitlines()

    assert [line.split()[1] for line in lines] == ["warning"] * 4
    assert [("again=2" in line) for line in lines] == [False, False, True, True]
    assert all("it failed" in line and "file=gport" in line for line in lines)


def test_a_failure_names_the_place_in_our_own_code() -> None:
    out = set_up()
    try:
        with Loop() as loop:
            loop.modify(0xFFFF, 0)
    except OSError as error:
        Failures(Log("test")).tell(0.0, "it failed", error)
    assert re.search(r"at=knet/loop\.py:\d+", out.getvalue())


def test_failures_of_ever_new_kinds_are_kept_within_bounds() -> None:
    set_up()
    failures = Failures(Log("test"))
    for number in range(3 * MOST_KINDS):
        failures.tell(0.0, "it failed", failure(number))
    assert len(failures._throttles) <= MOST_KINDS
