"""Readings and what is made of them: medians, ratios, goals, tables for people and for programs.

A series is the same thing measured once in each round.  What is compared was measured within
the same rounds, so a ratio can be taken twice: of the medians, which is the figure, and round
by round, which shows how far to trust it.

    >>> fast = Series("fast", "packets/s", (90.0, 110.0, 100.0))
    >>> slow = Series("slow", "packets/s", (50.0,))
    >>> Goal("at least half of it", "slow", "fast", at_least=0.5).ratio([fast, slow])
    0.5
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True, slots=True)
class Series:
    """The readings of one thing, a round each; at least one."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle one."""
        return median(self.values)

    @property
    def subject(self) -> str:
        """What was measured: `nginx`, if the name is `nginx: download`; else the name."""
        return self.name.partition(": ")[0]

    @property
    def quantity(self) -> str:
        """What was measured of it: `download, MB/s`; else just the unit."""
        quantity = self.name.partition(": ")[2]
        return f"{quantity}, {self.unit}" if quantity else self.unit


@dataclass(frozen=True, slots=True)
class Goal:
    """A bound on the ratio of two series; without a bound the ratio is information.

    If `below` names several series, that of them counts which has the greatest median, or in a
    round the greatest reading: the best of those that were measured, where more is better.
    """

    text: str
    above: str
    below: str | tuple[str, ...]
    at_least: float | None = None
    at_most: float | None = None

    def ratio(self, series: Iterable[Series]) -> float | None:
        """`above` to `below`, by their medians; None if either wasn't measured, or is zero."""
        above, below = self._compared(series)
        best = max((each.median for each in below), default=0.0)
        return above.median / best if above and best else None

    def spread(self, series: Iterable[Series]) -> tuple[float, float] | None:
        """The least and the greatest ratio of any one round."""
        above, below = self._compared(series)
        if above is None:
            return None
        rounds = zip(above.values, *(each.values for each in below), strict=False)
        ratios = [first / max(others) for first, *others in rounds if any(others)]
        return (min(ratios), max(ratios)) if ratios else None

    def _compared(self, series: Iterable[Series]) -> tuple[Series | None, list[Series]]:
        by_name = {each.name: each for each in series}
        below = (self.below,) if isinstance(self.below, str) else self.below
        return by_name.get(self.above), [by_name[name] for name in below if name in by_name]

    def bound(self) -> str:
        """The bound as text; empty if there is none."""
        if self.at_least is not None:
            return f">= {self.at_least:g}"
        return "" if self.at_most is None else f"<= {self.at_most:g}"

    def verdict(self, ratio: float | None) -> str:
        """`met`, `missed`, `not measured`, or `information`."""
        if ratio is None:
            return "not measured"
        if self.at_least is not None:
            return "met" if ratio >= self.at_least else "missed"
        if self.at_most is not None:
            return "met" if ratio <= self.at_most else "missed"
        return "information"


@dataclass(frozen=True, slots=True)
class Group:
    """What was measured together, and what is to be said about it."""

    key: str
    title: str
    about: tuple[str, ...]
    series: tuple[Series, ...]
    goals: tuple[Goal, ...]
    left_out: tuple[str, ...]
    machine: Mapping[str, str]


def by_quantity(series: Iterable[Series]) -> dict[str, list[Series]]:
    """What can be compared, together; all in the order in which they came."""
    together: dict[str, list[Series]] = {}
    for each in series:
        together.setdefault(each.quantity, []).append(each)
    return together


def number(value: float) -> str:
    """A reading for people: three or four digits that mean something.

    >>> number(123456.7), number(12.345), number(0.5)
    ('123,457', '12.3', '0.50')
    """
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def goal_line(goal: Goal, series: Sequence[Series]) -> str:
    """One line: the ratio, its spread, the bound, the verdict."""
    ratio, spread = goal.ratio(series), goal.spread(series)
    if ratio is None or spread is None:
        return f"{goal.text}: {goal.verdict(None)}"
    rounds = f"rounds {number(spread[0])} to {number(spread[1])}"
    bound = f", goal {goal.bound()}" if goal.bound() else ""
    return f"{goal.text}: {number(ratio)} ({rounds}{bound}): {goal.verdict(ratio)}"


def markdown(groups: Iterable[Group]) -> str:
    """All of it for people."""
    parts = [
        "# Benchmarks",
        "Medians of rounds measured by turns on one machine. Only ratios count: the machine is as "
        "fast as it happened to be. Written by `make bench`; `--only` renews one part.",
    ]
    for group in groups:
        parts += [f"## {group.title}", "\n".join(group.about)]
        parts.append("\n".join(_table(group.series)))
        if group.goals:
            parts.append("\n".join(f"- {goal_line(goal, group.series)}" for goal in group.goals))
        if group.left_out:
            parts.append("\n".join(f"- Left out: {reason}" for reason in group.left_out))
        parts.append("Machine: " + ", ".join(f"{k} {v}" for k, v in group.machine.items()) + ".")
    return "\n\n".join(parts) + "\n"


def _table(series: Sequence[Series]) -> list[str]:
    rows = [
        f"| {each.name} | {number(each.median)} | {each.unit} "
        f"| {', '.join(number(value) for value in each.values)} |"
        for comparable in by_quantity(series).values()
        for each in comparable
    ]
    return ["| | median | unit | rounds |", "|---|---:|---|---|", *rows]


def as_json(group: Group) -> dict[str, Any]:
    """The group as plain values, with medians and ratios worked out; `from_json` reads it back."""
    plain = asdict(group)
    for shown, each in zip(plain["series"], group.series, strict=True):
        shown["median"] = each.median
    for shown, goal in zip(plain["goals"], group.goals, strict=True):
        ratio = goal.ratio(group.series)
        shown |= {"ratio": ratio, "verdict": goal.verdict(ratio)}
    return plain


def from_json(plain: Mapping[str, Any]) -> Group:
    """The group that `as_json` wrote.  Raises KeyError or TypeError for anything else."""
    return Group(
        key=plain["key"],
        title=plain["title"],
        about=tuple(plain["about"]),
        series=tuple(Series(s["name"], s["unit"], tuple(s["values"])) for s in plain["series"]),
        goals=tuple(
            Goal(g["text"], g["above"], _names(g["below"]), g["at_least"], g["at_most"])
            for g in plain["goals"]
        ),
        left_out=tuple(plain["left_out"]),
        machine=dict(plain["machine"]),
    )


def _names(plain: str | list[str]) -> str | tuple[str, ...]:
    return plain if isinstance(plain, str) else tuple(plain)
