"""Programs of ours among this host's processes, and the file tree that each of them is for.

A process tells by its command line what it is, however it was started:

    /opt/krelay/bin/python3 /opt/krelay/bin/tcp-relay --root run
    python3 -B -m krelay daemon
    python3 -I .../knet/isolated.py tcp_relay --root /run/krelay

and a tree has many names: relative to the folder that the process stands in, by way of symbolic
links, or in its KRELAY_ROOT.  Two of them are the same if they lead to the same place.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from procfs_sim.tree import DEFAULT_ROOT, ROOT_VARIABLE

KRELAY, TCP_RELAY = "krelay", "tcp-relay"
_NAMES = {"krelay": KRELAY, "tcp-relay": TCP_RELAY, "tcp_relay": TCP_RELAY}
_PYTHON = re.compile(r"python[0-9.]*|pypy[0-9.]*")
_WITH_VALUE = ("-W", "-X")
"""Options of Python's that have a word of their own behind them."""
_RUNNER = "isolated.py"
"""It runs the module that is named next (isolated.py)."""
_ROOT_OPTION = re.compile(r"--r(?:o(?:ot?)?)?(?:=(.*))?", re.DOTALL)
"""argparse takes any beginning of an option that is no other's."""


class Ours(NamedTuple):
    """A program of ours, and what it was told."""

    name: str
    arguments: tuple[str, ...]


class RunningProgram(NamedTuple):
    """A process, as far as it can be seen."""

    pid: int
    arguments: tuple[str, ...]
    """Its command line."""
    folder: str = ""
    """Where it stands; empty if that can't be seen."""
    root: str = ""
    """Its KRELAY_ROOT."""

    def serves(self, root: Path) -> bool:
        """Whether it is a program of ours and for this tree, or for all that can be seen may be."""
        ours = program(self.arguments)
        if ours is None:
            return False
        tree = tree_of(ours.arguments) or self.root or DEFAULT_ROOT
        if not os.path.isabs(tree):
            if not self.folder:
                return True  # can't be told
            tree = os.path.join(self.folder, tree)
        return os.path.realpath(tree) == os.path.realpath(root)


def program(arguments: Sequence[str]) -> Ours | None:
    """Which program of ours a command line runs, if one.

    >>> program(["python3", "-B", "-m", "krelay", "daemon"])
    Ours(name='krelay', arguments=('daemon',))
    >>> program(["vim", "tcp-relay"])
    """
    words = list(arguments)
    if not words:
        return None
    if _PYTHON.fullmatch(os.path.basename(words[0])):
        words = _script(words[1:])
    if words and os.path.basename(words[0]) == _RUNNER:
        words = words[1:]
    if not words:
        return None
    path = words[0]
    if os.path.basename(path) == "__main__.py":
        path = os.path.dirname(path)
    name = _NAMES.get(os.path.basename(path))
    return Ours(name, tuple(words[1:])) if name else None


def tree_of(arguments: Sequence[str]) -> str | None:
    """The file tree that a command line of ours names: its last --root.

    >>> tree_of(["daemon", "--root", "run"]), tree_of(["--root=/x"]), tree_of(["daemon"])
    ('run', '/x', None)
    """
    found = None
    for word, following in zip_longest(arguments, arguments[1:]):
        if match := _ROOT_OPTION.fullmatch(word):
            found = following if match[1] is None else match[1]
    return found


def running(root: Path) -> Iterator[Ours]:
    """Programs of ours that run now and are for this tree; not this process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            seen = look(int(entry.name))
            ours = program(seen.arguments) if seen else None
            if seen is not None and ours is not None and seen.serves(root):
                yield ours


def look(pid: int) -> RunningProgram | None:
    """What can be seen of a process; None if there is none, or it has no command line."""
    entry = Path(f"/proc/{pid}")
    try:
        text = (entry / "cmdline").read_bytes()
    except OSError:
        return None
    if not text:
        return None
    arguments = tuple(os.fsdecode(text).removesuffix("\0").split("\0"))
    folder = root = ""
    with suppress(OSError):
        folder = os.readlink(entry / "cwd")
    with suppress(OSError):
        for line in os.fsdecode((entry / "environ").read_bytes()).split("\0"):
            name, _, value = line.partition("=")
            if name == ROOT_VARIABLE:
                root = value
    return RunningProgram(pid, arguments, folder, root)


def _script(words: list[str]) -> list[str]:
    """What Python runs, and its arguments: behind Python's own options."""
    while words and words[0].startswith("-") and words[0] != "-":
        option = words.pop(0)
        if option == "-m" or (not option.startswith("--") and option.endswith("m")):
            return words
        if option.startswith("-m"):
            return [option[2:], *words]
        if option == "-c":
            return []
        if option in _WITH_VALUE and words:
            words.pop(0)
    return words
