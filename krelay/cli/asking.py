"""What the commands share: how one fails, the daemon asked, a setting checked and written."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from knet import trust
from procfs_sim import ondisk
from procfs_sim.ondisk import FileTree
from procfs_sim.tree import SettingRefused, parse, render

IN_FORCE_WITHIN = 5.0
"""Seconds that a command waits for a value to be in force; normally it takes milliseconds."""
_PAUSE = 0.01


class Failed(Exception):
    """The command failed.  The text is the one line that says why and what to do."""


class Misused(Exception):
    """The command was written wrongly.  The text says how."""


def ask(root: Path, request: str) -> list[str]:
    """The lines that the daemon answers; waits for one that is being started.  Raises Failed."""
    from krelay.cli import starting
    from krelay.control import client

    try:
        return starting.answered(root, lambda: client.ask(root, request))
    except (client.NoDaemon, client.Rejected) as error:
        raise Failed(error) from None
    except OSError as error:
        raise Failed(f"no answer from the krelay that serves {root}: {error}") from None


def tries() -> Iterator[None]:
    """Goes on for IN_FORCE_WITHIN, with pauses."""
    deadline = time.monotonic() + IN_FORCE_WITHIN
    while time.monotonic() < deadline:
        yield
        time.sleep(_PAUSE)


def checked(name: str, text: str) -> str:
    """The text of a setting as the file tree shows it.  Raises Failed for one that is refused."""
    try:
        return render(name, parse(name, text))
    except SettingRefused as reason:
        raise Failed(f"{name}: {reason}") from None


def put(root: Path, name: str, text: str) -> None:
    """Writes a setting as `echo` does.

    Raises Failed; trust.Untrusted if others can change the tree.
    """
    path = root / name
    ondisk.check(root)
    try:
        FileTree(root).put(name, text + "\n")
    except FileNotFoundError:
        raise Failed(f"there is no {path}; start a krelay, it makes the file tree") from None
    except trust.Untrusted:
        raise
    except OSError as error:
        fix = "; run as root" if isinstance(error, PermissionError) else ""
        raise Failed(f"{path} can't be written: {error.strerror}{fix}") from None


def joined(words: Sequence[str] | None) -> str | None:
    """The text of a setting that may be written as several words."""
    return None if words is None else " ".join(words)


def print_lines(lines: Sequence[str]) -> None:
    """Prints the lines of an answer as they came."""
    for line in lines:
        print(line)
