"""What people see: aligned columns, colour only on a terminal, and streams that may close early."""

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
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
_NUMBERS = {"id", "gport", "age", "idle", "expires", "packets", "bytes"}
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


def console() -> Console:
    """Standard output; wide enough for a table's rows where it isn't a terminal."""
    return Console(width=None if sys.stdout.isatty() else 200, highlight=False)


def nat_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The NAT table, a row each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in _COLUMNS:
        table.add_column(
            name, justify="right" if name in _NUMBERS else "left", overflow="fold", no_wrap=True
        )
    for row in rows:
        table.add_row(*(_cell(name, row.get(name, "")) for name in _COLUMNS))
    return table


def listing(values: Mapping[str, Any]) -> Table:
    """A name and a value a line."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    for name, value in values.items():
        table.add_row(name, _cell(name, value))
    return table


def trace_line(line: str) -> Text:
    """A line of the trace, its step and its new addresses coloured."""
    styled = Text(line)
    styled.highlight_regex(r"^[TUD]\d(,U\d)?", "bold cyan")
    styled.highlight_regex(r"=> .*(?= flow)", "green")
    styled.highlight_regex(r"flow \d+$", "dim")
    return styled


def _cell(name: str, value: Any) -> Text:
    shown = "/".join(map(str, value)) if isinstance(value, list) else str(value)
    return Text(shown, style=_STYLES.get(shown, "red" if shown.startswith("failed") else ""))
