"""Where people read: streams, lines as wide as the terminal, commands that a shell takes whole."""

from collections.abc import Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

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
