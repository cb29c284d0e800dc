"""Who serves a file tree: the process that holds the lock on its directory, until it dies."""

import fcntl
import os
from pathlib import Path


def take(root: Path) -> int | None:
    """The descriptor that holds the lock while it is open; None if another process has it.

    Raises OSError if there is no such directory or it can't be opened.
    """
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def is_served(root: Path) -> bool:
    """Whether a krelay is at work on this tree."""
    try:
        fd = take(root)
    except OSError:
        return False
    if fd is None:
        return True
    os.close(fd)
    return False
