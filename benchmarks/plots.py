"""The tables as pictures: bars of medians, with a mark for each round.

One SVG for each group, with a panel for each quantity.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from benchmarks.figures import Group, Series, by_quantity, number

_COLOUR, _MARK = "#4878a8", "#222222"
_IN_ONE_COLUMN = 5
_FIXED: Any = {"svg.hashsalt": "krelay", "svg.fonttype": "none"}
"""The same figures make the same file."""


def draw(group: Group, path: Path) -> None:
    """Writes the group's picture."""
    panels = list(by_quantity(group.series).items())
    columns = 1 if len(panels) <= _IN_ONE_COLUMN else 2
    rows = [panels[at : at + columns] for at in range(0, len(panels), columns)]
    heights = [max(len(shown) for _, shown in row) for row in rows]
    with matplotlib.rc_context(_FIXED):
        figure, axes = pyplot.subplots(
            len(rows),
            columns,
            squeeze=False,
            figsize=(3 + 6 * columns, 0.4 * sum(heights) + 0.9 * len(rows) + 0.4),
            height_ratios=heights,
            layout="constrained",
        )
        for place, (label, shown) in zip(axes.flat, panels, strict=False):
            _bars(place, label, shown)
        for place in axes.flat[len(panels) :]:
            place.set_axis_off()
        figure.suptitle(group.title)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)


def _bars(panel: Any, label: str, shown: Sequence[Series]) -> None:
    panel.barh(
        [series.subject for series in shown],
        [series.median for series in shown],
        color=_COLOUR,
    )
    for at, series in enumerate(shown):
        panel.plot(series.values, [at] * len(series.values), "|", color=_MARK)
        beside = (max(series.values), at)
        panel.annotate(
            number(series.median), beside, (8, 0), textcoords="offset points", va="center"
        )
    panel.invert_yaxis()
    panel.margins(x=0.15)
    panel.set_xlim(left=0)
    panel.set_xlabel(label)
    panel.xaxis.set_major_formatter("{x:,g}")
    panel.spines[["top", "right"]].set_visible(False)
