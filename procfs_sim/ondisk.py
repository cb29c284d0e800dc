"""The file tree as real files: created, read, written back, watched.

Four facts about the kernel shape this module.

1.  inotify tells names, not contents, and a file may be open for writing again by the time it is
    read.  So a file is read after it was closed, moved or removed, never because a neighbour was;
    and if it was modified since, not before the next close.  truncate(2) modifies without any
    close: whether a writer is left is then asked (fact 3).
2.  Opening for writing and closing is an event even if nothing was written.  So write-back looks
    first and opens for writing only when it will write; otherwise a refused file that somebody
    holds open would be judged in a circle.
3.  A lease (fcntl(2), F_SETLEASE) is granted only if nobody else has the file open: F_RDLCK, for
    writing; F_WRLCK, at all.  While it is held, whoever opens the file waits.  Taken for the
    instant of a write-back it makes "still the text that was judged?" and the writing one step, so
    no user's write is lost between.  The signal that breaks a lease is SIGIO, which would end the
    process; SIGURG is asked for instead, which nobody notices.  Leases are for the owner and not on
    every file system; without one the two steps are merely close together.
4.  A rename in place changes the inode: an editor's open descriptor would go on writing to a file
    that is gone.  So settings are written in place.  A read may overlap such a write; under the
    lease, nobody who opens the file sees anything but the old text or the new one, and who had it
    open all the time sees newlines, not the old text's tail, until the file is cut to its size.
    Status files are for reading alone and are renamed into place.
"""

import errno
import fcntl
import os
import signal
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from inotify_simple import INotify, flags

from procfs_sim.state import Outcome
from procfs_sim.tree import DEFAULTS, DIRECTORIES, SETTINGS, STATUS, in_force

MAX_TEXT = 64 * 1024
"""Bytes of a file that are read; no accepted text is longer."""

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755

_TRIES = 10
_PAUSE = 0.001
"""Seconds; a lease, or a reader's open file, mostly lasts microseconds."""


class FileTree:
    """The files below `root`.  One process writes; any number may read.

    OSErrors of the disk pass through.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self) -> None:
        """Create what is missing, settings with their defaults; what exists stays as it is."""
        for directory in (self.root, *(self.root / name for name in DIRECTORIES)):
            try:
                directory.mkdir(parents=True)
            except FileExistsError:
                if not directory.is_dir():
                    raise NotADirectoryError(
                        errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(directory)
                    ) from None
            else:
                directory.chmod(DIRECTORY_MODE)
        for name in SETTINGS:
            self._create_file(name, in_force(name, DEFAULTS) + "\n")

    def read(self, name: str) -> str | None:
        """The text of a file, None if there is none.

        Undecodable bytes are replaced, what comes after MAX_TEXT is cut.

        What is no regular file, or can't be opened by this user, reads as a text in parentheses,
        which no setting accepts.
        """
        path = self.root / name
        for _ in range(_TRIES):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            except BlockingIOError:  # a lease, which is for an instant
                time.sleep(_PAUSE)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except PermissionError:
                return "(a file that may not be read)"
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENXIO):  # a symbolic link, a socket
                    return _NO_FILE
                raise
            else:
                with _closing(fd):
                    return _text(fd)
        return "(a file under another program's lease)"

    def read_all(self) -> dict[str, str | None]:
        """The texts of all settings, as `read` gives them."""
        return {name: self.read(name) for name in SETTINGS}

    def write_back(self, outcome: Outcome) -> None:
        """Show what is to be shown, and give the judged files their owner and mode back.

        A file that holds another text by now, or that somebody has open for writing, is left alone:
        its next event is under way.
        """
        for name, text in outcome.judged.items():
            if name in outcome.show:
                self.show_if(name, text, outcome.show[name])
            elif text is not None and self._is_foreign(name):
                # Written too, not only chmodded: readers that couldn't read it wait for an event.
                self.show_if(name, text, text)

    def show(self, name: str, text: str) -> None:
        """Write a setting in place, whatever it holds; recreate it if it is gone."""
        for tries_left in reversed(range(_TRIES)):
            if self._create_file(name, text):
                return
            with self._opened(name, os.O_RDWR) as fd:
                if fd is None:
                    self._make_way(name)
                elif _lease(fd, fcntl.F_WRLCK) is not False or not tries_left:
                    _overwrite(fd, text)
                    return
            time.sleep(_PAUSE)

    def show_if(self, name: str, expected: str | None, text: str) -> bool:
        """Write a setting in place if it still holds `expected` and nobody has it open for writing.

        `expected` None: if it is still gone.  False if it was left alone.
        """
        if expected is None:
            return self._create_file(name, text)
        for tries_left in reversed(range(_TRIES)):
            if self.read(name) != expected or self.has_writer(name):
                return False
            with self._opened(name, os.O_RDWR) as fd:
                if fd is None:
                    break
                # Who only reads prevents the lease too: on the last try the text alone decides.
                if _lease(fd, fcntl.F_WRLCK) is not False or not tries_left:
                    if _text(fd) != expected:
                        return False
                    _overwrite(fd, text)
                    return True
            time.sleep(_PAUSE)
        return self._make_way(name) and self._create_file(name, text)

    def has_writer(self, name: str) -> bool | None:
        """Whether somebody has this file open for writing; None if that can't be known."""
        try:
            with self._opened(name, os.O_RDONLY | os.O_NONBLOCK) as fd:
                if fd is None:
                    return False
                granted = _lease(fd, fcntl.F_RDLCK)
                return None if granted is None else not granted
        except BlockingIOError:  # another process is inside show_if
            return True
        except PermissionError:
            return None

    def publish(self, name: str, text: str) -> None:
        """Put a status file in place of the one before; it is never seen half."""
        path, new = self.root / name, self.root / _new_name(name)
        try:
            with suppress(FileNotFoundError):
                new.unlink()
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            with _closing(fd):
                os.fchmod(fd, FILE_MODE)
                _write_all(fd, text.encode())
            new.rename(path)
        except OSError:
            with suppress(OSError):
                new.unlink()
            raise

    def remove_status(self) -> None:
        """Remove the status files: nobody keeps them any more."""
        for name in STATUS:
            for path in (self.root / name, self.root / _new_name(name)):
                with suppress(FileNotFoundError, IsADirectoryError):
                    path.unlink()

    def _create_file(self, name: str, text: str) -> bool:
        """False if something of that name exists."""
        create = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(self.root / name, create, FILE_MODE)
        except FileExistsError:
            return False
        with _closing(fd):
            _overwrite(fd, text)
        return True

    @contextmanager
    def _opened(self, name: str, how: int) -> Iterator[int | None]:
        """A descriptor of the regular file of that name; None if there is none."""
        try:
            fd = os.open(self.root / name, how | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            yield None
            return
        with _closing(fd):
            yield fd if stat.S_ISREG(os.fstat(fd).st_mode) else None

    def _make_way(self, name: str) -> bool:
        """Remove what is no regular file; False if that fails (a directory with files in it)."""
        path = self.root / name
        try:
            mode = path.lstat().st_mode
            if stat.S_ISDIR(mode):
                path.rmdir()
            elif not stat.S_ISREG(mode):
                path.unlink()
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True

    def _is_foreign(self, name: str) -> bool:
        """Whether a file that was moved into place brought an owner or a mode of its own."""
        try:
            found = (self.root / name).lstat()
        except OSError:
            return False
        return stat.S_ISREG(found.st_mode) and _is_foreign(found)


class TreeWatcher:
    """Tells which files of the tree at `root` were written, by inotify.  A context manager.

    Raises FileNotFoundError if the tree isn't there, and other OSErrors.
    """

    def __init__(self, root: Path) -> None:
        self._tree = FileTree(root)
        self._gone = False
        self._published: set[int] = set()
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

        In the order of their last events.  A status file that somebody else wrote or removed is
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
            # Events were lost, closes among them: only a writer that is known to be there is a
            # reason to wait.
            ready = [name for name in SETTINGS if not self._tree.has_writer(name)]
            status = dict.fromkeys(STATUS)
        else:
            ready = [name for name, done in settled.items() if done or self._is_complete(name)]
        return {name: self._tree.read(name) for name in ready} | dict[str, str | None](status)

    def _is_complete(self, name: str) -> bool:
        """Whether a file that was modified, but not closed since, has no writer to close it."""
        return self._tree.has_writer(name) is False

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

_NO_FILE = "(not a regular file)"
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


def _new_name(name: str) -> str:
    """Where a status file is written before it is renamed."""
    directory, _, file_name = name.rpartition("/")
    return f"{directory}/.{file_name}.new"


_NEW_NAMES = frozenset(map(_new_name, STATUS))


@contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _text(fd: int) -> str:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        return _NO_FILE
    return os.pread(fd, MAX_TEXT, 0).decode(errors="replace")


def _lease(fd: int, kind: int) -> bool | None:
    """Take a lease until `fd` is closed.  False: others have the file open.  None: impossible."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_foreign(found: os.stat_result) -> bool:
    not_ours = os.geteuid() == 0 and found.st_uid != 0
    return stat.S_IMODE(found.st_mode) != FILE_MODE or not_ours


def _overwrite(fd: int, text: str) -> None:
    """Replace the content in place; the file is never empty meanwhile."""
    found = os.fstat(fd)
    if _is_foreign(found):
        with suppress(PermissionError):
            if os.geteuid() == 0:
                os.fchown(fd, 0, 0)
            os.fchmod(fd, FILE_MODE)
    data = text.encode(errors="replace")
    os.lseek(fd, 0, os.SEEK_SET)
    _write_all(fd, data.ljust(min(found.st_size, MAX_TEXT), b"\n"))
    os.ftruncate(fd, len(data))


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
