"""Medians, ratios and goals, and that what was written can be read back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.figures import Goal, Group, Series, as_json, from_json, goal_line, markdown, number

KERNEL = Series("kernel", "packets/s", (200.0, 100.0, 120.0))
OURS = Series("ours", "packets/s", (90.0, 60.0, 30.0))
SLOW = Series("slow", "packets/s", (300.0, 10.0, 20.0))
"""Slower than the kernel but for the first round."""


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
        (Goal("", "nginx", ("ours", "kernel")), None, "not measured"),
        (Goal("", "ours", ("slow", "kernel"), at_least=0.51), 0.5, "missed"),
        (Goal("", "ours", ("kernel", "slow"), at_least=0.51), 0.5, "missed"),
        (Goal("", "ours", ("nginx", "kernel"), at_least=0.5), 0.5, "met"),
    ],
)
def test_a_goal_is_judged_by_the_ratio_of_medians(
    goal: Goal, ratio: float | None, verdict: str
) -> None:
    assert goal.ratio([KERNEL, OURS, SLOW]) == ratio
    assert goal.verdict(goal.ratio([KERNEL, OURS, SLOW])) == verdict


def test_the_spread_is_of_ratios_within_a_round() -> None:
    assert Goal("", "ours", "kernel").spread([KERNEL, OURS]) == (30 / 120, 60 / 100)


def test_of_several_the_greatest_of_each_round_makes_the_spread() -> None:
    fast_once = Series("fast once", "packets/s", (1.0, 300.0, 2.0))
    goal = Goal("", "ours", ("nginx", "kernel", "fast once"))
    assert goal.spread([KERNEL, OURS, fast_once]) == (60 / 300, 90 / 200)
    assert Goal("", "ours", ("slow", "kernel")).spread([KERNEL, SLOW]) is None
    assert Goal("", "ours", ("nginx", "haproxy")).spread([OURS]) is None


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


def test_the_table_has_the_same_quantity_of_all_together() -> None:
    names = ("a: down", "a: up", "b: down", "plain", "b: up")
    text = markdown([group(*(Series(name, "MB/s", (1.0,)) for name in names))])
    rows = [line.split(" | ")[0] for line in text.splitlines() if "MB/s" in line]
    assert rows == ["| a: down", "| b: down", "| a: up", "| b: up", "| plain"]


def test_a_series_tells_what_was_measured_of_what() -> None:
    download = Series("nginx: download", "MB/s", (1.0,))
    assert (download.subject, download.quantity) == ("nginx", "download, MB/s")
    assert (KERNEL.subject, KERNEL.quantity) == ("kernel", "packets/s")


readings = st.lists(st.floats(0, 1e9), min_size=1, max_size=5).map(tuple)
series = st.builds(Series, st.text(), st.text(), readings)
bounds = st.none() | st.floats(0, 100)
below = st.text() | st.lists(st.text(), max_size=3).map(tuple)
goals = st.builds(Goal, st.text(), st.text(), below, bounds, bounds)


@given(st.lists(series, max_size=4), st.lists(goals, max_size=3))
def test_what_is_written_is_read_back(measured: list[Series], wanted: list[Goal]) -> None:
    before = group(*measured, goals=tuple(wanted))
    assert from_json(json.loads(json.dumps(as_json(before)))) == before


@given(st.floats(0, 1e12))
def test_a_number_for_people_is_right_to_a_twentieth(value: float) -> None:
    assert float(number(value).replace(",", "")) == pytest.approx(value, rel=0.05, abs=0.005)
