"""The file tree as real files: created, read, written back, watched.

Four facts about the kernel shape this module.

1.  inotify tells names, not contents, and a file may be open for writing again by the time it is
    read.  So a file is read after it was closed, moved or removed, never because a neighbour was;
    and if it was modified since, not before the next close.  truncate(2) modifies without any
    close: whether a writer is left is then asked (fact 3).
2.  Opening for writing and closing is an event even if nothing was written.  So write-back looks
    first and opens for writing only when it will write; otherwise a refused file that a program
    holds open would be judged in a circle.
3.  A lease (fcntl(2), F_SETLEASE) is granted only if no other process has the file open: F_RDLCK,
    for writing; F_WRLCK, at all.  While it is held, a process that opens the file waits.  Taken for
    the instant of a write-back it makes "still the text that was judged?" and the writing one step,
    so no user's write is lost between.  The signal that breaks a lease is SIGIO, which would end
    the process; SIGURG is asked for instead, which no process notices.  A lease is for the owner,
    and not on every file system; without one the two steps are merely close together.
4.  A rename in place changes the inode: an editor's open descriptor would go on writing to a file
    that is gone.  So settings are written in place.  A read may overlap such a write; under the
    lease, a program that opens the file sees the old text or the new one and nothing else; one that
    had it open all the time sees newlines, not the old text's tail, until the file is cut to size.
    Status files are for reading alone and are renamed into place.

Two things about other users at work.  What lies in the place of a setting may be a link to a
file of other use: only our own file is written, changed or shown (files.is_ours); anything else
loses its name here to a new file, which no owner or reader of the old one reaches.  And a disk may
be full or broken: what can't be written is told, by name, and stays as it was.
"""

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from knet import trust
from procfs_sim import files
from procfs_sim.files import FILE_MODE
from procfs_sim.state import Outcome
from procfs_sim.tree import DEFAULTS, DIRECTORIES, SETTINGS, STATUS, in_force

DIRECTORY_MODE = 0o755

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
        check(self.root)  # again: another may have been faster

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
                    return files.no_file(found)
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
                with files.closing(fd):
                    return files.text(fd, name)
        return "(a file under another program's lease)"

    def read_all(self) -> dict[str, str | None]:
        """The texts of all settings, as `read` gives them."""
        return {name: self.read(name) for name in SETTINGS}

    def write_back(self, outcome: Outcome) -> dict[str, OSError]:
        """Show what is to be shown, and give the judged files their owner and mode back.

        A file that holds another text by now, or that a program has open for writing, is left
        alone: its next event is under way.  Name -> why of those that couldn't be written.
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
                failed[name] = files.without_frames(error)
        return failed

    def put(self, name: str, text: str) -> None:
        """Write a setting as a user does, by `echo`.

        Raises FileNotFoundError if there is none, trust.Untrusted if it isn't a file of the tree's
        own, other OSErrors if it can't be written.
        """
        path = self.root / name
        found = path.lstat()
        if not files.is_single(found):
            raise trust.Untrusted(path, f"is {files.kind(found)}, and no setting", "rm")
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)  # waits for leases to end
        with files.closing(fd):
            if not files.is_single(found := os.fstat(fd)):
                raise trust.Untrusted(path, f"is {files.kind(found)}, and no setting", "rm")
            files.overwrite(fd, text)

    def show(self, name: str, text: str) -> None:
        """Write a setting in place, whatever it holds; recreate it if it is gone."""
        for tries_left in reversed(range(_TRIES)):
            if self._create_file(name, text):
                return
            try:
                with self._opened(name, os.O_RDWR) as fd:
                    if fd is None:
                        self._make_way(name)
                    elif files.lease(fd, fcntl.F_WRLCK) is not False or not tries_left:
                        files.overwrite(fd, text)
                        return
            except BlockingIOError:
                if not tries_left:
                    raise
            time.sleep(_PAUSE)

    def show_if(self, name: str, expected: str | None, text: str) -> bool:
        """Write a setting in place if it still holds `expected` and isn't open for writing.

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
                    # A reader prevents the lease too: on the last try the text alone decides.
                    if files.lease(fd, fcntl.F_WRLCK) is not False or not tries_left:
                        if files.text(fd, name) != expected:
                            return False
                        files.overwrite(fd, text)
                        return True
            except BlockingIOError:
                if not tries_left:
                    raise
            time.sleep(_PAUSE)
        return self._make_way(name) and self._create_file(name, text)

    def has_writer(self, name: str) -> bool | None:
        """Whether a program has this file open for writing; None if that can't be known."""
        try:
            with self._opened(name, os.O_RDONLY, files.is_file) as fd:
                if fd is None:
                    return False
                granted = files.lease(fd, fcntl.F_RDLCK)
                return None if granted is None else not granted
        except BlockingIOError:  # another process is inside show_if
            return True
        except PermissionError:
            return None

    def publish(self, name: str, text: str) -> None:
        """Put a status file in place of the one before; it is never seen half."""
        path, new = self.root / name, self.root / new_name(name)
        try:
            with suppress(FileNotFoundError):
                new.unlink()
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            with files.closing(fd):
                os.fchmod(fd, FILE_MODE)
                files.write_all(fd, text.encode())
            new.rename(path)
        except OSError:
            with suppress(OSError):
                new.unlink()
            raise

    def remove_status(self) -> None:
        """Remove the status files: no daemon keeps them any more."""
        for name in STATUS:
            for path in (self.root / name, self.root / new_name(name)):
                with suppress(FileNotFoundError, IsADirectoryError):
                    path.unlink()

    def _create_file(self, name: str, text: str) -> bool:
        """False if something of that name exists."""
        create = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            fd = os.open(self.root / name, create, FILE_MODE)
        except FileExistsError:
            return False
        with files.closing(fd):
            try:
                files.overwrite(fd, text)
            except OSError:  # no room: an empty file would be a text that is to be judged
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
        fits = fits or files.is_ours
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
        with files.closing(fd):
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
            elif not files.is_ours(found):
                path.unlink()
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True

    def _is_ours(self, name: str) -> bool:
        try:
            return files.is_ours((self.root / name).lstat())
        except OSError:
            return False

    def _is_tidy(self, name: str) -> bool:
        """Whether a file that was moved into place has brought no owner or mode of its own."""
        try:
            found = (self.root / name).lstat()
        except OSError:
            return True
        return files.is_ours(found) and stat.S_IMODE(found.st_mode) == FILE_MODE


_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)


def new_name(name: str) -> str:
    """Where a status file is written before it is renamed."""
    directory, _, file_name = name.rpartition("/")
    return f"{directory}/.{file_name}.new"
