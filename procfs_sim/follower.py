"""What is written to the tree, as it is written: for the daemon that keeps it, and for readers.

inotify tells, as long as the kernel has a watch left for this user.  Where it has none the tree is
looked at instead: the follower's owner calls `look` every LOOK seconds, which also tries for a
watch again.
"""

import select
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from knet.loop import Loop
from procfs_sim.ondisk import FileTree
from procfs_sim.tree import SETTINGS
from procfs_sim.watcher import NO_WATCH, TreeWatcher

LOOK = 1.0
"""Seconds between looks at a tree that can't be watched."""


class TreeFollower:
    """Follows the tree at `root`; `changed` is called when `changes` has something to tell."""

    def __init__(self, loop: Loop, root: Path, changed: Callable[[], object]) -> None:
        self._loop = loop
        self._root = root
        self._tree = FileTree(root)
        self._changed = changed
        self._watcher: TreeWatcher | None = None
        self._seen: dict[str, str | None] = {}
        """The texts that were looked at last."""

    @property
    def is_watching(self) -> bool:
        """Whether the kernel tells what is written; otherwise it is seen by looking."""
        return self._watcher is not None

    @property
    def gone(self) -> bool:
        """Whether the tree was removed or replaced (TreeWatcher.gone)."""
        return self._watcher is not None and self._watcher.gone

    @property
    def unread(self) -> dict[str, OSError]:
        """What couldn't be read, and why; `changes` tries again."""
        return self._watcher.unread if self._watcher is not None else {}

    def watch(self) -> OSError | None:
        """Has the kernel tell; the error where it has no watch left.  Raises other OSErrors.

        What was written before isn't told: read the tree behind it (`read_all`).
        """
        try:
            watcher = TreeWatcher(self._root)
            try:
                self._loop.add(watcher.fileno(), select.EPOLLIN, lambda _: self._changed())
            except BaseException:
                watcher.close()
                raise
        except OSError as error:
            if error.errno not in NO_WATCH:
                raise
            return error
        self._watcher = watcher
        return None

    def stop(self) -> None:
        """Has it told no more."""
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            self._loop.remove(watcher.fileno())
            with suppress(OSError):  # it is gone all the same
                watcher.close()

    def read_all(self) -> dict[str, str | None]:
        """The texts of all settings as they are now.  Raises OSError."""
        texts = self._tree.read_all()
        self._seen = dict(texts)
        return texts

    def saw(self, name: str, text: str | None) -> None:
        """This text is known: to see it is no news."""
        self._seen[name] = text

    def forget(self, name: str, error: OSError) -> None:
        """This file couldn't be read: it is to be read once more."""
        self._seen.pop(name, None)
        if self._watcher is not None:
            self._watcher.failed(name, error)

    def changes(self) -> dict[str, str | None]:
        """What was written since, as TreeWatcher.changes tells it.  Raises OSError."""
        return self._watcher.changes() if self._watcher is not None else {}

    def look(self) -> dict[str, str | None]:
        """The texts that differ from those seen last, of files that no program has open for
        writing.  Raises OSError."""
        texts = {name: self._tree.read(name) for name in SETTINGS}
        news = {name: text for name, text in texts.items() if self._seen.get(name) != text}
        whole = {name: text for name, text in news.items() if not self._tree.has_writer(name)}
        self._seen |= whole
        return whole
