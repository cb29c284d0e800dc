"""Medians, ratios and goals, and that what was written can be read back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.figures import Goal, Group, Series, as_json, from_json, goal_line, markdown, number

KERNEL = Series("kernel", "packets/s", (200.0, 100.0, 120.0))
OURS = Series("ours", "packets/s", (90.0, 60.0, 30.0))


def group(*series: Series, goals: tuple[Goal, ...] = (), left_out: tuple[str, ...] = ()) -> Group:
    return Group("udp", "UDP", ("How.",), series, goals, left_out, {"cores": "2"})


@pytest.mark.parametrize(
    ("goal", "ratio", "verdict"),
    [
        (Goal("", "ours", "kernel", at_least=0.5), 0.5, "met"),
        (Goal("", "ours", "kernel", at_least=0.51), 0.5, "missed"),
        (Goal("", "ours", "kernel", at_most=0.5), 0.5, "met"),
        (Goal("", "ours", "kernel", at_most=0.49), 0.5, "missed"),
        (Goal("", "ours", "kernel"), 0.5, "information"),
        (Goal("", "ours", "nginx", at_least=0.1), None, "not measured"),
    ],
)
def test_a_goal_is_judged_by_the_ratio_of_medians(
    goal: Goal, ratio: float | None, verdict: str
) -> None:
    assert goal.ratio([KERNEL, OURS]) == ratio
    assert goal.verdict(goal.ratio([KERNEL, OURS])) == verdict


def test_the_spread_is_of_ratios_within_a_round() -> None:
    assert Goal("", "ours", "kernel").spread([KERNEL, OURS]) == (30 / 120, 60 / 100)


def test_a_peer_that_did_nothing_makes_no_ratio() -> None:
    idle = Series("idle", "packets/s", (0.0, 0.0))
    goal = Goal("ours to idle", "ours", "idle", at_least=1)
    assert goal_line(goal, [OURS, idle]) == "ours to idle: not measured"


def test_a_goal_line_says_ratio_rounds_bound_and_verdict() -> None:
    goal = Goal("ours to kernel", "ours", "kernel", at_least=0.4)
    expected = "ours to kernel: 0.50 (rounds 0.25 to 0.60, goal >= 0.4): met"
    assert goal_line(goal, [KERNEL, OURS]) == expected


def test_the_table_shows_medians_rounds_and_what_was_left_out() -> None:
    text = markdown([group(KERNEL, OURS, left_out=("wrk isn't installed",))])
    assert "| kernel | 120 | packets/s | 200, 100, 120 |" in text
    assert "- Left out: wrk isn't installed" in text
    assert "Machine: cores 2." in text


readings = st.lists(st.floats(0, 1e9), min_size=1, max_size=5).map(tuple)
series = st.builds(Series, st.text(), st.text(), readings)
bounds = st.none() | st.floats(0, 100)
goals = st.builds(Goal, st.text(), st.text(), st.text(), bounds, bounds)


@given(st.lists(series, max_size=4), st.lists(goals, max_size=3))
def test_what_is_written_is_read_back(measured: list[Series], wanted: list[Goal]) -> None:
    before = group(*measured, goals=tuple(wanted))
    assert from_json(json.loads(json.dumps(as_json(before)))) == before


@given(st.floats(0, 1e12))
def test_a_number_for_people_is_right_to_a_twentieth(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.05, abs=0.005)
