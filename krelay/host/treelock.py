"""Who serves a file tree: the process that holds the lock on its file `.lock`, until it dies.

flock(2) asks for no more than a descriptor, so a user who may read a file can lock it, and keep
krelay from its own tree.  So the lock is on a file that its owner alone can open; one that others
can open is worth nothing, whoever has locked it, and is replaced.
"""

import errno
import fcntl
import os
import stat
from pathlib import Path

NAME = ".lock"
MODE = 0o600

_TRIES = 10
_HOW = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""For reading: a file that is open for writing keeps its file system from becoming read-only."""
_OTHERS = 0o077


def take(root: Path) -> int | None:
    """The descriptor that holds the lock while it is open; None if another process has it.

    Raises OSError if there is no such directory, or the lock's file can't be made or opened.
    """
    path = root / NAME
    for _ in range(_TRIES):  # again if it was removed or replaced under us
        fd = _opened(path)
        if fd is None:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            linked = os.fstat(fd).st_nlink > 1  # a file of other use: let go, not kept locked
            if holds(root, fd) and not linked:
                return fd
            if linked:
                _remove(path)
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))


def holds(root: Path, fd: int) -> bool:
    """Whether a descriptor that `take` gave is of the file that the tree's lock is on now.

    Raises OSError if that can't be found out.
    """
    try:
        found = (root / NAME).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    ours = os.fstat(fd)
    return (found.st_dev, found.st_ino) == (ours.st_dev, ours.st_ino)


def is_served(root: Path) -> bool:
    """Whether a krelay is at work on this tree."""
    path = root / NAME
    try:
        fd = os.open(path, _HOW)
    except PermissionError:
        return _is_locked(path)
    except OSError:
        return False
    try:
        if not _is_private(os.fstat(fd)):
            return False
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _opened(path: Path) -> int | None:
    """A file that its owner alone can open; None if what stood there was removed: try again."""
    try:
        fd = os.open(path, _HOW | os.O_CREAT, MODE)
    except OSError as error:
        # A symbolic link, a directory, a socket, or a device that isn't there.
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        _remove(path)
        return None
    try:
        found = os.fstat(fd)
        if _is_private(found):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    _remove(path)
    return None


def _is_private(found: os.stat_result) -> bool:
    ours = found.st_uid in (0, os.geteuid())
    return ours and stat.S_ISREG(found.st_mode) and not found.st_mode & _OTHERS


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        path.rmdir()


def _is_locked(path: Path) -> bool:
    """The same for who may not open the file: the kernel's list of locks (proc_locks(5))."""
    try:
        found = path.lstat()
        locks = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return False
    where = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    return any("FLOCK" in line and where in line.split() for line in locks)
