"""What is done to a file of the tree that is open: read, told apart, written in place, leased."""

import fcntl
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from knet import trust
from procfs_sim.tree import SettingRefused, parse

MAX_TEXT = 64 * 1024
"""Bytes of a file that are read; no accepted text is longer."""

FILE_MODE = 0o644


def without_frames(error: OSError) -> OSError:
    """The error alone, to be kept.

    Its frames would hold what it is kept in: a circle, or the error before, and so on.
    """
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


@contextmanager
def closing(fd: int) -> Iterator[None]:
    try:
        yield
    finally:
        os.close(fd)


def text(fd: int, name: str) -> str:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        return no_file(found)
    if found.st_nlink < 2:
        return os.pread(fd, MAX_TEXT, 0).decode(errors="replace")
    # Whoever may link to our file can do so, where fs.protected_hardlinks is 0: that's no reason to
    # refuse it.
    if found.st_uid in (0, os.geteuid()) and stat.S_IMODE(found.st_mode) == FILE_MODE:
        text = os.pread(fd, MAX_TEXT, 0).decode(errors="replace")
        with suppress(SettingRefused, KeyError):
            parse(name, text)
            return text
    return no_file(found)


def no_file(found: os.stat_result) -> str:
    return f"({kind(found)})"


def kind(found: os.stat_result) -> str:
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


def lease(fd: int, kind: int) -> bool | None:
    """Take a lease until `fd` is closed.  False: others have the file open.  None: impossible."""
    try:
        fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, fcntl.F_SETLEASE, kind)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_file(found: os.stat_result) -> bool:
    return stat.S_ISREG(found.st_mode)


def is_ours(found: os.stat_result) -> bool:
    """Whether it is a file that only we can have written, and that nothing else is made of."""
    return (
        stat.S_ISREG(found.st_mode)
        and found.st_uid == os.geteuid()
        and found.st_nlink == 1
        and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    )


def is_single(found: os.stat_result) -> bool:
    """Whether it is a file of root's or ours that nothing else is made of."""
    ours = found.st_uid in (0, os.geteuid())
    return stat.S_ISREG(found.st_mode) and ours and found.st_nlink == 1


def overwrite(fd: int, text: str) -> None:
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
        write_all(fd, data.ljust(min(found.st_size, MAX_TEXT), b"\n"))
        os.ftruncate(fd, len(data))
    except OSError:
        with suppress(OSError):
            write_all(fd, before)
            os.ftruncate(fd, found.st_size)
        raise


def write_all(fd: int, data: bytes) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], done)
