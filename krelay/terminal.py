"""What people see: aligned columns, colour only on a terminal, and streams that may close early."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.measure import Measurement
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


MOST_WIDE = 1000


def console() -> Console:
    """Standard output."""
    return Console(highlight=False)


def show(console: Console, table: Table) -> None:
    """Prints a table in its whole width: a terminal that is narrower breaks the lines."""
    unlimited = console.options.update_width(MOST_WIDE)
    console.width = max(console.width, Measurement.get(console, unlimited, table).maximum)
    console.print(table, crop=False, soft_wrap=True)


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
