"""What the daemon answers, as people see it: aligned columns, colour only on a terminal."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from rich.table import Table
from rich.text import Text

_COLUMNS = (
    "id",
    "proto",
    "state",
    "client",
    "service",
    "gport",
    "relay",
    "server",
    "source",
    "age",
    "idle",
    "expires",
    "packets",
    "bytes",
)
RATE = "bytes/s"
_SHOWN = (*_COLUMNS, RATE)
_WATCHED = (
    *("id", "client", "state", "bytes", RATE, "service", "server", "idle", "proto", "age"),
    *("expires", "packets", "relay", "source", "gport"),
)
"""The most important first."""
ALWAYS = 4
GAP = 2
"""Blanks between columns."""
_NUMBERS = {RATE, "id", "gport", "age", "idle", "expires", "packets", "bytes"}
_STYLES = {
    "established": "green",
    "replied": "green",
    "opening": "yellow",
    "unreplied": "yellow",
    "closing": "dim",
    "closed": "dim",
    "running": "bold green",
    "stopped": "bold",
}


def nat_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The NAT table, a row each."""
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in _COLUMNS:
        table.add_column(
            name, justify="right" if name in _NUMBERS else "left", overflow="fold", no_wrap=True
        )
    for row in rows:
        table.add_row(*(_cell(row.get(name, "")) for name in _COLUMNS))
    return table


class Rates:
    """How many bytes a second each flow carries, from the client and from the server."""

    def __init__(self) -> None:
        self._before: dict[int, tuple[float, list[int]]] = {}
        self._rates: dict[int, list[float]] = {}

    def seen(self, rows: Iterable[Mapping[str, Any]], now: float) -> None:
        """These are the rows now (seconds).  A flow that was not there before has none yet."""
        before, self._before, self._rates = self._before, {}, {}
        for row in rows:
            self._before[row["id"]] = now, row["bytes"]
            if row["id"] in before:
                then, bytes_then = before[row["id"]]
                self._rates[row["id"]] = [
                    max(0, new - old) / max(now - then, 1e-3)
                    for new, old in zip(row["bytes"], bytes_then, strict=True)
                ]

    def of(self, row: Mapping[str, Any]) -> list[float]:
        """Bytes a second, each way; nothing if that isn't known yet."""
        return self._rates.get(row["id"], [])


def watch_table(rows: Sequence[Mapping[str, Any]], rates: Rates, width: int, height: int) -> Table:
    """The NAT table for a terminal of that many columns and lines: the busiest flows first.

    What there is no room for is left out: of the columns the least important, of the rows the
    last; a line says how many.
    """
    ordered = sorted(rows, key=lambda row: (-sum(rates.of(row)), row["id"]))
    most = max(1, height - 2)
    shown = ordered if len(ordered) <= most else ordered[: most - 1]
    cells = [
        {name: _cell(row.get(name, "")) for name in _COLUMNS}
        | {
            "bytes": Text("/".join(map(short, row["bytes"]))),
            RATE: Text("/".join(map(short, rates.of(row)))),
        }
        for row in shown
    ]
    names = fitting({n: max([len(n), *(len(row[n]) for row in cells)]) for n in _WATCHED}, width)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
    for name in names:
        justify: Literal["left", "right"] = "right" if name in _NUMBERS else "left"
        table.add_column(name, justify=justify, overflow="ellipsis", no_wrap=True)
    for row in cells:
        table.add_row(*(row[name] for name in names))
    if len(shown) < len(ordered):
        table.caption = f"and {len(ordered) - len(shown)} more"
        table.caption_justify = "left"
    return table


def fitting(widths: Mapping[str, int], width: int) -> list[str]:
    """The columns that fit into `width`, in the order in which people read them.

    `widths` are theirs, the most important first.  The first four are always there.
    """
    chosen = list(widths)
    while len(chosen) > ALWAYS and sum(widths[n] + GAP for n in chosen) - GAP > width:
        chosen.pop()
    return sorted(chosen, key=_SHOWN.index)


def short(number: float) -> str:
    """In three digits, like 12k or 3.4M: units of a thousand.

    >>> short(999), short(1000), short(12_345), short(999_999), short(3_400_000)
    ('999', '1.0k', '12k', '1.0M', '3.4M')
    """
    for unit in ("", "k", "M", "G", "T"):
        if number < 9.95 and unit:
            return f"{number:.1f}{unit}"
        if number < 999.5:
            return f"{number:.0f}{unit}"
        number /= 1000
    return f"{number:.0f}P"


def listing(values: Mapping[str, Any]) -> Text:
    """A name and a value a line, the values aligned."""
    width = max(map(len, values), default=0)
    lines = (Text(f"{name:{width}}  ", "dim") + _cell(value) for name, value in values.items())
    return Text("\n").join(lines)


def trace_line(line: str) -> Text:
    """A line of the trace, its step and its new addresses coloured."""
    styled = Text(line)
    styled.highlight_regex(r"^[TUD]\d(,U\d)?", "bold cyan")
    styled.highlight_regex(r"^drop \S+|^lost .*", "bold red")
    styled.highlight_regex(r"^pass \S+", "yellow")
    styled.highlight_regex(r"=> .*(?= flow)", "green")
    styled.highlight_regex(r"flow \d+$", "dim")
    return styled


def _cell(value: Any) -> Text:
    match value:
        case list():
            shown = "/".join(map(str, value))
        case dict():
            shown = " ".join(f"{name}:{number}" for name, number in value.items())
        case _:
            shown = str(value)
    return Text(shown, style=_STYLES.get(shown, "red" if shown.startswith("failed") else ""))
