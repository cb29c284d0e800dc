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

Two things about who else may be at work.  What lies in the place of a setting may be a link to a
file of other use: only our own file is written, changed or shown (`_is_ours`); anything else loses
its name here to a new file, which who owned or opened the old one doesn't reach.  And a disk may be
full or broken: what can't be written is told, by name, and stays as it was.
"""

import errno
import fcntl
import os
import signal
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from inotify_simple import INotify, flags

from knet import trust
from procfs_sim.state import Outcome
from procfs_sim.tree import DEFAULTS, DIRECTORIES, SETTINGS, STATUS, SettingRefused, in_force, parse

MAX_TEXT = 64 * 1024
"""Bytes of a file that are read; no accepted text is longer."""

FILE_MODE = 0o644
DIRECTORY_MODE = 0o755

NO_WATCH = (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM)
"""Errors of TreeWatcher where the kernel has no inotify instance or watch left for this user
(inotify(7))."""

_TRIES = 10
_PAUSE = 0.001
"""Seconds; a lease, or a reader's open file, mostly lasts microseconds."""


def check(root: Path) -> None:
    """Raises Untrusted if others than root and our own user can change the tree at `root`.

    What isn't there yet is fine, if only root or we can make it.  Raises other OSErrors if that
    can't be found out.
    """
    trust.check(root, DIRECTORIES)


class FileTree:
    """The files below `root`.  One process writes; any number may read.

    OSErrors of the disk pass through.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def create(self) -> None:
        """Create what is missing, settings with their defaults; what exists stays as it is.

        Raises what `create_directories` raises, before any file is made.
        """
        self.create_directories()
        for name in SETTINGS:
            self._create_file(name, in_force(name, DEFAULTS) + "\n")

    def create_directories(self) -> None:
        """Create the directories that are missing.

        Raises trust.Untrusted if others can change the tree.
        """
        check(self.root)
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
        check(self.root)  # again: somebody may have been faster

    def read(self, name: str) -> str | None:
        """The text of a file, None if there is none.

        Undecodable bytes are replaced, what comes after MAX_TEXT is cut.

        What is no regular file, or can't be opened by this user, reads as a text in parentheses,
        which no setting accepts; so does a file with a second name, unless all may read it and its
        text is accepted: it may be a file of other use, that root alone may see.
        """
        path = self.root / name
        for _ in range(_TRIES):
            try:
                found = path.lstat()
                if not stat.S_ISREG(found.st_mode):  # to open a device may do something
                    return _no_file(found)
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            except BlockingIOError:  # a lease, which is for an instant
                time.sleep(_PAUSE)
            except (FileNotFoundError, NotADirectoryError):
                return None
            except PermissionError as error:
                if error.errno != errno.EACCES:  # no matter of the file's mode: it may pass
                    raise
                return "(a file that may not be read)"
            except OSError as error:
                if error.errno in (errno.ELOOP, errno.ENXIO):  # it has become something else
                    continue
                raise
            else:
                with _closing(fd):
                    return _text(fd, name)
        return "(a file under another program's lease)"

    def read_all(self) -> dict[str, str | None]:
        """The texts of all settings, as `read` gives them."""
        return {name: self.read(name) for name in SETTINGS}

    def write_back(self, outcome: Outcome) -> dict[str, OSError]:
        """Show what is to be shown, and give the judged files their owner and mode back.

        A file that holds another text by now, or that somebody has open for writing, is left alone:
        its next event is under way.  Name -> why of those that couldn't be written.
        """
        failed: dict[str, OSError] = {}
        for name, text in outcome.judged.items():
            try:
                if name in outcome.show:
                    self.show_if(name, text, outcome.show[name])
                elif text is not None and not self._is_tidy(name):
                    # Written too, not only chmodded: readers that couldn't read it wait for an
                    # event.
                    self.show_if(name, text, text)
            except OSError as error:
                failed[name] = _without_frames(error)
        return failed

    def put(self, name: str, text: str) -> None:
        """Write a setting as a user does, by `echo`.

        Raises FileNotFoundError if there is none, trust.Untrusted if it isn't a file of the tree's
        own, other OSErrors if it can't be written.
        """
        path = self.root / name
        found = path.lstat()
        if not _is_single(found):
            raise trust.Untrusted(path, f"is {_kind(found)}, and no setting", "rm")
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)  # waits for leases to end
        with _closing(fd):
            if not _is_single(found := os.fstat(fd)):
                raise trust.Untrusted(path, f"is {_kind(found)}, and no setting", "rm")
            _overwrite(fd, text)

    def show(self, name: str, text: str) -> None:
        """Write a setting in place, whatever it holds; recreate it if it is gone."""
        for tries_left in reversed(range(_TRIES)):
            if self._create_file(name, text):
                return
            try:
                with self._opened(name, os.O_RDWR) as fd:
                    if fd is None:
                        self._make_way(name)
                    elif _lease(fd, fcntl.F_WRLCK) is not False or not tries_left:
                        _overwrite(fd, text)
                        return
            except BlockingIOError:
                if not tries_left:
                    raise
            time.sleep(_PAUSE)

    def show_if(self, name: str, expected: str | None, text: str) -> bool:
        """Write a setting in place if it still holds `expected` and nobody has it open for writing.

        `expected` None: if it is still gone.  False if it was left alone.
        """
        if expected is None:
            return self._create_file(name, text)
        for tries_left in reversed(range(_TRIES)):
            if self.read(name) != expected:
                return False
            if not self._is_ours(name):
                break
            if self.has_writer(name):
                return False
            try:
                with self._opened(name, os.O_RDWR) as fd:
                    if fd is None:
                        break
                    # Who only reads prevents the lease too: on the last try the text alone decides.
                    if _lease(fd, fcntl.F_WRLCK) is not False or not tries_left:
                        if _text(fd, name) != expected:
                            return False
                        _overwrite(fd, text)
                        return True
            except BlockingIOError:
                if not tries_left:
                    raise
            time.sleep(_PAUSE)
        return self._make_way(name) and self._create_file(name, text)

    def has_writer(self, name: str) -> bool | None:
        """Whether somebody has this file open for writing; None if that can't be known."""
        try:
            with self._opened(name, os.O_RDONLY, _is_file) as fd:
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
            try:
                _overwrite(fd, text)
            except OSError:  # no room: an empty file would be a text that somebody has to judge
                with suppress(OSError):
                    (self.root / name).unlink()
                raise
        return True

    @contextmanager
    def _opened(
        self, name: str, how: int, fits: Callable[[os.stat_result], bool] | None = None
    ) -> Iterator[int | None]:
        """A descriptor of the file of that name if it `fits`, by default if it is the tree's own.

        None if there is none.  Raises BlockingIOError while another process has a lease on it, as a
        file server may.
        """
        fits = fits or _is_ours
        try:
            if not fits((self.root / name).lstat()):
                yield None
                return
            fd = os.open(self.root / name, how | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise
            yield None
            return
        with _closing(fd):
            try:
                yield fd if fits(os.fstat(fd)) else None
            finally:
                with suppress(OSError):  # there may be none
                    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)

    def _make_way(self, name: str) -> bool:
        """Remove what isn't ours; False if that fails (a directory with files in it)."""
        path = self.root / name
        try:
            found = path.lstat()
            if stat.S_ISDIR(found.st_mode):
                path.rmdir()
            elif not _is_ours(found):
                path.unlink()
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True

    def _is_ours(self, name: str) -> bool:
        try:
            return _is_ours((self.root / name).lstat())
        except OSError:
            return False

    def _is_tidy(self, name: str) -> bool:
        """Whether a file that was moved into place has brought no owner or mode of its own."""
        try:
            found = (self.root / name).lstat()
        except OSError:
            return True
        return _is_ours(found) and stat.S_IMODE(found.st_mode) == FILE_MODE


def prepare_watching() -> None:
    """Does what the first TreeWatcher would, for a process that may start no program later.

    inotify_simple looks for libc by running ldconfig, or gcc (ctypes.util.find_library).
    """
    with suppress(OSError):
        INotify().close()


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
        self.unread[name] = _without_frames(error)

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

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


def _new_name(name: str) -> str:
    """Where a status file is written before it is renamed."""
    directory, _, file_name = name.rpartition("/")
    return f"{directory}/.{file_name}.new"


_NEW_NAMES = frozenset(map(_new_name, STATUS))


def _without_frames(error: OSError) -> OSError:
    """The error alone, to be kept.

    Its frames would hold what it is kept in: a circle, or the error before, and so on.
    """
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


@contextmanager
def _closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def _text(fd: int, name: str) -> str:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        return _no_file(found)
    if found.st_nlink < 2:
        return os.pread(fd, MAX_TEXT, 0).decode(errors="replace")
    # Whoever may link to our file can do so, where fs.protected_hardlinks is 0: that's no reason to
    # refuse it.
    if found.st_uid in (0, os.geteuid()) and stat.S_IMODE(found.st_mode) == FILE_MODE:
        text = os.pread(fd, MAX_TEXT, 0).decode(errors="replace")
        with suppress(SettingRefused, KeyError):
            parse(name, text)
            return text
    return _no_file(found)


def _no_file(found: os.stat_result) -> str:
    return f"({_kind(found)})"


def _kind(found: os.stat_result) -> str:
    """What lies in the place of a file of ours, and whose it is."""
    kind = _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
    if stat.S_ISREG(found.st_mode):
        kind = "a hard link" if found.st_nlink > 1 else "a file"
    return f"{kind}, owner {trust.user(found.st_uid)}"


_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


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


def _is_file(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode)


def _is_ours(found: os.stat_result) -> bool:
    """Whether it is a file that only we can have written, and that nothing else is made of."""
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_uid == os.geteuid()
        and found.st_nlink == 1
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def _is_single(found: os.stat_result) -> bool:
    """Whether it is a file of root's or ours that nothing else is made of."""
    ours = found.st_uid in (0, os.geteuid())
    return stat.S_ISREG(found.st_mode) and ours and found.st_nlink == 1


def _overwrite(fd: int, text: str) -> None:
    """Replace the content in place; the file is never empty meanwhile.

    If that fails halfway (no room for a second page), the old content is put back, which needs
    none.
    """
    found = os.fstat(fd)
    if stat.S_IMODE(found.st_mode) != FILE_MODE:
        with suppress(PermissionError):
            os.fchmod(fd, FILE_MODE)
    before = os.pread(fd, MAX_TEXT, 0) if found.st_size else b""
    data = text.encode(errors="replace")
    try:
        _write_all(fd, data.ljust(min(found.st_size, MAX_TEXT), b"\n"))
        os.ftruncate(fd, len(data))
    except OSError:
        with suppress(OSError):
            _write_all(fd, before)
            os.ftruncate(fd, found.st_size)
        raise


def _write_all(fd: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], done)
