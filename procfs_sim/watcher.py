"""inotify on the tree: which of its files were written."""

import ctypes
import errno
from pathlib import Path
from types import TracebackType
from typing import Self

import inotify_simple
from inotify_simple import INotify, flags

from procfs_sim.files import without_frames
from procfs_sim.ondisk import FileTree, new_name
from procfs_sim.tree import DIRECTORIES, SETTINGS, STATUS

NO_WATCH = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM)
"""Errors of TreeWatcher where the kernel has no inotify instance or watch left for this user
(inotify(7))."""


# inotify_simple would look for libc by running ldconfig, or gcc (ctypes.util.find_library), which
# takes as long as all else that it does, and a process that is confined may start no program.  It
# is loaded already: this is a handle to it.
inotify_simple._libc = ctypes.CDLL(None, use_errno=True)


class TreeWatcher:
    """Tells which files of the tree at `root` were written, by inotify.  A context manager.

    Raises FileNotFoundError if the tree isn't there, and other OSErrors.
    """

    def __init__(self, root: Path) -> None:
        self._tree = FileTree(root)
        self._gone = False
        self._published: set[int] = set()
        self.unread: dict[str, OSError] = {}
        """What couldn't be read, and why; the next call of `changes` tries again."""
        self._inotify = INotify(nonblocking=True)
        try:
            self._prefixes = {
                self._inotify.add_watch(root / directory, _WATCHED): directory and directory + "/"
                for directory in ("", *DIRECTORIES)
            }
        except BaseException:
            self._inotify.close()
            raise

    @property
    def gone(self) -> bool:
        """Whether a directory of the tree was deleted, replaced or unmounted, as of `changes`.

        A new watcher is needed then.
        """
        return self._gone

    def fileno(self) -> int:
        """Readable when there are changes."""
        return int(self._inotify.fileno())

    def changes(self) -> dict[str, str | None]:
        """Name -> text (None: gone) of what was written since the last call; never waits.

        In the order of their last events.  A status file that others wrote or removed is
        told with None.
        """
        settled: dict[str, bool] = {}
        status: dict[str, None] = {}
        overflow = False
        for wd, mask, cookie, file_name in self._inotify.read(timeout=0):
            if mask & flags.Q_OVERFLOW:
                overflow = True
                continue
            self._gone |= bool(mask & _GONE)
            name = self._prefixes.get(wd, "") + file_name
            if name in SETTINGS:
                settled.pop(name, None)
                settled[name] = bool(mask & _SETTLED)
            elif name in _NEW_NAMES and mask & flags.MOVED_FROM:
                self._published.add(cookie)
            elif name in STATUS and mask & _SETTLED:
                if mask & flags.MOVED_TO and cookie in self._published:
                    self._published.discard(cookie)  # publish itself: no reason to publish again
                else:
                    status[name] = None
        if overflow:
            settled = dict.fromkeys(SETTINGS, False)
            status = dict.fromkeys(STATUS)
        again, self.unread = self.unread, {}
        texts: dict[str, str | None] = {}
        for name, done in (dict.fromkeys(again, False) | settled).items():
            try:
                if done or self._is_complete(name, lost=overflow or name in again):
                    texts[name] = self._tree.read(name)
            except OSError as error:
                self.failed(name, error)
        return texts | dict[str, str | None](status)

    def failed(self, name: str, error: OSError) -> None:
        """A setting couldn't be read: `changes` tries again."""
        self.unread[name] = without_frames(error)

    def _is_complete(self, name: str, *, lost: bool) -> bool:
        """Whether a file that was modified, but not closed since, has no writer to close it.

        `lost`: its close may have been missed, so only a writer that is known to be there is a
        reason to wait.
        """
        has_writer = self._tree.has_writer(name)
        return not has_writer if lost else has_writer is False

    def close(self) -> None:
        """Stop watching."""
        self._inotify.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


_SETTLED = flags.CLOSE_WRITE | flags.MOVED_TO | flags.MOVED_FROM | flags.DELETE
_GONE = flags.DELETE_SELF | flags.MOVE_SELF | flags.UNMOUNT
_WATCHED = (
    _SETTLED | flags.MODIFY | flags.CREATE | flags.DELETE_SELF | flags.MOVE_SELF
    # What happens to an inode that has lost its name is no news of the name.
    | flags.EXCL_UNLINK | flags.ONLYDIR
)  # fmt: skip

_NEW_NAMES = frozenset(map(new_name, STATUS))
