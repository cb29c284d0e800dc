"""Room on the disk that the file tree has in hand before it is needed.

A user who writes a setting has it emptied first, and where the disk is full the block that this
frees is soon somebody else's: the file stays empty, krelay can't show the value in force in it, and
its next user can't write to it either.  So some blocks, and an inode, are kept in a file of no
content, which is given up when a write finds no room, and made again when there is some.
"""

import errno
import os
from contextlib import suppress
from pathlib import Path

NAME = ".reserve"
SIZE = 64 * 1024
"""Bytes: as many blocks as a tree has files, or nearly so."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o600


class Reserve:
    """The reserve of the tree at `root`."""

    def __init__(self, root: Path) -> None:
        self._path = root / NAME

    def fill(self) -> None:
        """Has it there in full.  Raises OSError; if there is no room for all of it, there is none.

        What others made of that name is replaced.
        """
        with suppress(FileNotFoundError):
            if self._path.lstat().st_size == SIZE:
                return
            self._path.unlink()
        fd = os.open(self._path, _NEW, _MODE)
        try:
            os.posix_fallocate(fd, 0, SIZE)
        except OSError:
            with suppress(OSError):
                self._path.unlink()
            raise
        finally:
            os.close(fd)

    def release(self) -> bool:
        """Gives up its room; False if there was none."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True
