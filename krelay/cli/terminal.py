"""What people see: aligned columns, colour only on a terminal, and streams that may close early."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

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


MOST_WIDE = 1000
LEAST_WIDE = 30
"""Columns that are to be left beside an indentation; where fewer would be it is SHORT_INDENT."""
SHORT_INDENT = 4
BROKEN = " \\"
"""The end of a line of a command that goes on in the next."""


def console() -> Console:
    """Standard output."""
    return Console(highlight=False)


def errors() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False)


def size(console: Console) -> tuple[int, int]:
    """Columns and lines; as good as unlimited where it is no terminal."""
    return (console.width, console.height) if console.is_terminal else (MOST_WIDE, 1_000_000)


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


def wrapped(head: Text, words: Sequence[Text], command: Sequence[Text], width: int) -> Text:
    """`head`, words, and the words of a shell command, in lines of at most so many columns.

    Lines are broken between words, and those that follow are indented as far as the head, or less
    where that would leave too little.  A word that is longer has a line of its own.  Where the
    command is broken the line ends with a backslash.
    """
    indent = len(head) if width >= len(head) + LEAST_WIDE else SHORT_INDENT
    lines, line = [], head.copy()
    every = [*words, *command]
    at = len(head)
    for number, word in enumerate(every):
        within = number > len(words)  # a break before this word is one within the command
        more = len(words) <= number < len(every) - 1
        room = width - len(BROKEN) if more else width
        blank = 0 if line.plain.endswith(" ") else 1
        if at > indent and at + blank + len(word) > room and line.plain.strip():
            if within:
                line.append(BROKEN)
            lines.append(line)
            line, at, blank = Text(" " * indent), indent, 0
        line.append(" " * blank).append_text(word)
        at = len(line)
    return Text("\n").join([*lines, line])


def shell_words(command: str) -> list[str]:
    """A shell command cut at the blanks that aren't quoted.

    >>> shell_words("nft add rule '{ 80, 81 }' && echo \\"a b\\"")
    ['nft', 'add', 'rule', "'{ 80, 81 }'", '&&', 'echo', '"a b"']
    """
    found, quote = [""], ""
    for character in command:
        if character == " " and not quote:
            found.append("")
            continue
        if character in "'\"" and quote in ("", character):
            quote = "" if quote else character
        found[-1] += character
    return [word for word in found if word]


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
