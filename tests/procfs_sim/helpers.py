"""A keeper of a tree on disk, and what users do to its files."""

import select
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from procfs_sim.ondisk import FileTree
from procfs_sim.state import TreeState
from procfs_sim.tree import in_force
from procfs_sim.watcher import TreeWatcher

BOUND = 30.0
"""Seconds after which a condition that doesn't come is a failure."""


def shell(tree: FileTree, command: str) -> None:
    subprocess.run(["sh", "-ec", command], cwd=tree.root, check=True, timeout=BOUND)


class Keeper:
    """The daemon's part: judge what changes and write back."""

    def __init__(self, tree: FileTree, watcher: TreeWatcher) -> None:
        self.tree, self.watcher, self.state = tree, watcher, TreeState()

    def step(self, timeout: float = 0) -> bool:
        """False if there was nothing to do within `timeout`."""
        if not select.select([self.watcher.fileno()], [], [], timeout)[0]:
            return False
        self.tree.write_back(self.state.written(self.watcher.changes(), time.monotonic()))
        return True

    def settle(self) -> None:
        """All that is under way, and the grace of what is empty."""
        for _ in range(1000):
            if not self.step():
                outcome = self.state.on_time(time.monotonic() + 2)
                self.tree.write_back(outcome)
                if not outcome.show:
                    return
        pytest.fail("does not settle")

    def differing(self) -> dict[str, str | None]:
        """Files that don't show the value in force."""
        return {
            name: text
            for name, text in self.tree.read_all().items()
            if text is None or text.strip() != in_force(name, self.state.config)
        }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < end, "the condition didn't come"
        threading.Event().wait(0.001)
