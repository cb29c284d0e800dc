"""`python -m procfs_sim`: the settings of a tree as a table: file, text, what is accepted.

It only reads; no daemon is needed.  What a file holds right now is the value in force once a daemon
has judged it.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from knet.usage import CommandParser
from procfs_sim.ondisk import FileTree
from procfs_sim.tree import (
    BLANKS,
    DEFAULT_ROOT,
    MAX_SHOWN,
    ROOT_VARIABLE,
    SETTINGS,
    SettingRefused,
    parse,
    shown,
    words,
)


def table(tree: FileTree) -> str:
    """The table as text, a line a setting, columns aligned."""
    rows = [("file", "value", "accepted")]
    for name, text in tree.read_all().items():
        rows.append((name, _cell(name, text), SETTINGS[name].accepted))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"


def _cell(name: str, text: str | None) -> str:
    if text is None:
        return "(missing)"
    try:
        parse(name, text)
    except SettingRefused:
        return f"{shown(text.strip(BLANKS))} (not accepted)"
    line = " ".join(words(text))
    return line if len(line) <= MAX_SHOWN else line[: MAX_SHOWN - 3] + "..."


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    parser = CommandParser(
        prog="python -m procfs_sim",
        description="Print the settings of a krelay file tree: file, value, what is accepted.",
        epilog="example: python -m procfs_sim --root /run/krelay",
    )
    parser.add_version()
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT),
        help=f"the tree (default: ${ROOT_VARIABLE}, or {DEFAULT_ROOT})",
    )
    root: Path = parser.read(arguments).root
    try:
        if not root.is_dir():
            print(
                f"error: there is no tree at {root}; start krelay, or name its tree by --root",
                file=sys.stderr,
            )
            return 1
        sys.stdout.write(table(FileTree(root)))
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: can't read the tree at {root}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
