"""The tables as pictures: bars of medians, with a mark for each round.  One SVG for each group."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot

from benchmarks.figures import Group, number

_COLOUR, _MARK = "#4878a8", "#222222"
_FIXED: Any = {"svg.hashsalt": "krelay", "svg.fonttype": "none"}
"""The same figures make the same file."""


def draw(group: Group, path: Path) -> None:
    """Writes the group's picture; a panel for each unit."""
    units = list(dict.fromkeys(series.unit for series in group.series))
    heights = [sum(series.unit == unit for series in group.series) for unit in units]
    with matplotlib.rc_context(_FIXED):
        figure, axes = pyplot.subplots(
            len(units),
            squeeze=False,
            figsize=(9, 0.4 * sum(heights) + 0.9 * len(units) + 0.4),
            height_ratios=heights,
            layout="constrained",
        )
        for panel, unit in zip(axes[:, 0], units, strict=True):
            shown = [series for series in group.series if series.unit == unit]
            widths = [series.median for series in shown]
            panel.barh([series.name for series in shown], widths, color=_COLOUR)
            for at, series in enumerate(shown):
                panel.plot(series.values, [at] * len(series.values), "|", color=_MARK)
                beside = (max(series.values), at)
                panel.annotate(
                    number(series.median), beside, (8, 0), textcoords="offset points", va="center"
                )
            panel.invert_yaxis()
            panel.margins(x=0.15)
            panel.set_xlabel(unit)
            panel.xaxis.set_major_formatter("{x:,g}")
            panel.spines[["top", "right"]].set_visible(False)
        figure.suptitle(group.title)
        figure.savefig(path, metadata={"Date": None})
        pyplot.close(figure)
