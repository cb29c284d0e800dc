"""The page that `krelay demo` writes: headings, commands, tables, and claims with their marks.

It looks the same on a terminal and in a file, but for colour and for what moves; a terminal may be
narrower than the page, not wider.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from krelay.demo import evidence
from krelay.demo.evidence import Check, Seen, ShownStep

WIDTH = 100
"""Columns where the output isn't a terminal; a terminal has as many as it has, but no more."""
ROOM_FOR_MORE = 90
"""Columns from which on the table of steps shows what each is and the TCP flags."""


class DemoFailed(Exception):
    """The demo can't go on.  The text is the one line that says why."""


class Page:
    """What the person reads, and the checks that were shown."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._began_at = time.monotonic()
        self._checks: list[Check] = []
        self._good, self._bad = ("ok", "NO") if console.options.ascii_only else ("✓", "✗")
        self.wide = console.width >= ROOM_FOR_MORE

    def title(self, text: str) -> None:
        """A heading, with room above."""
        self.text(f"\n{text}", "bold")

    def text(self, text: str, style: str = "", *, indent: int = 0) -> None:
        """Lines as they are: too long ones are left to the terminal, to be copied whole."""
        for line in text.split("\n"):
            self._console.print(Text((" " * indent + line).rstrip(), style), soft_wrap=True)

    def command(self, prompt: str, command: str, printed: str = "") -> None:
        """A command as it was typed, and what it printed."""
        line = Text(f"          {prompt} ", "dim").append(command, "bold not dim")
        self._console.print(line, soft_wrap=True)
        if printed:
            self.text(printed.rstrip("\n"), "green", indent=10)

    def table(self, table: Table) -> None:
        """A table, indented a little."""
        self._console.print(Padding(table, (0, 0, 1, 2), expand=False))

    def check(self, check: Check) -> None:
        """A claim with its mark; below a failed one, what was found."""
        self._checks.append(check)
        mark, style = (self._good, "bold green") if check.held else (self._bad, "bold red")
        self._console.print(Text(f"  {mark} ", style).append(check.claim, "not bold default"))
        if not check.held:
            self.text(check.found, "red", indent=4)

    @contextmanager
    def step(self, doing: str) -> Iterator[None]:
        """Says what is going on, and when it was done, in seconds since the beginning."""
        if self._console.is_terminal:
            with self._console.status(doing, spinner="line"):
                yield
        else:
            yield
        seconds = time.monotonic() - self._began_at
        self._console.print(Text(f"  {seconds:4.1f} s  ", "cyan").append(doing, "default"))

    def verdict(self) -> int:
        """The last line, and the exit status."""
        seconds = time.monotonic() - self._began_at
        failed = evidence.failures(self._checks)
        if failed:
            more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise DemoFailed(f"not so: {failed[0]}{more}")
        self.text(f"\nAll {len(self._checks)} checks held, in {seconds:.1f} seconds.", "bold green")
        return 0


def console() -> Console:
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
    console.width = min(console.width, WIDTH)
    return console


def nat_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The NAT table lying on its side: it is wider than a page."""
    names = dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(style="dim")
    for _ in rows:
        table.add_column()
    for name in names:
        table.add_row(name, *(_cell(row.get(name, "-")) for row in rows))
    return table


def _cell(value: Any) -> str:
    return "/".join(map(str, value)) if isinstance(value, list) else str(value)


def step_table(steps: Sequence[ShownStep], wires: evidence.Wires, *, wide: bool) -> Table:
    """Two lines a step, the packet before and after, and how often it was seen on which wire."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("step", no_wrap=True)
    table.add_column("   packet", no_wrap=True)
    for name in wires:
        table.add_column(f"{name}'s wire", no_wrap=True)
    for step in steps:
        label = Text(step.label, "bold cyan")
        for head, arrow, five_tuple, style in (
            (label, "   ", step.before, ""),
            (Text(step.title if wide else "", "dim"), "=> ", step.after, "green"),
        ):
            packet = Text(arrow).append(f"{five_tuple.src} > {five_tuple.dst}", style)
            cells = (
                _on_wire(evidence.on_wire(wire, five_tuple), wide=wide) for wire in wires.values()
            )
            table.add_row(head, packet, *cells)
    return table


def _on_wire(packets: Sequence[Seen], *, wide: bool) -> Text:
    if not packets:
        return Text("-", "dim")
    flags = " ".join(packet.flags for packet in packets) if wide else ""
    return Text(f"{len(packets)}").append(f" {flags}", "dim")
