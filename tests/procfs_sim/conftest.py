"""A tree on disk, and what looks after it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from procfs_sim.ondisk import FileTree
from procfs_sim.watcher import TreeWatcher
from tests.procfs_sim.helpers import Keeper


@pytest.fixture
def tree(tmp_path: Path) -> FileTree:
    tree = FileTree(tmp_path / "krelay")
    tree.create()
    return tree


@pytest.fixture
def watcher(tree: FileTree) -> Iterator[TreeWatcher]:
    with TreeWatcher(tree.root) as watcher:
        yield watcher


@pytest.fixture
def keeper(tree: FileTree, watcher: TreeWatcher) -> Keeper:
    return Keeper(tree, watcher)
