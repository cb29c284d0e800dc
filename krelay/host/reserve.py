"""Room on the disk that the file tree has in hand before it is needed.

A user who writes a setting has it emptied first, and where the disk is full the block that this
frees is soon another program's: the file stays empty, krelay can't show the value in force in it,
and its next user can't write to it either.  So some blocks, and an inode, are kept in a file of no
content, which is given up when a write finds no room, and made again when there is some.
"""

import errno
import os
from pathlib import Path

NAME = ".reserve"
SIZE = 64 * 1024
"""Bytes: as many blocks as a tree has files, or nearly so."""
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

STEP = SIZE // 4
"""What is given up at a time: the program that fills the disk may be quicker than krelay."""

_HOW = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o600


class Reserve:
    """The reserve of the tree at `root`."""

    def __init__(self, root: Path) -> None:
        self._path = root / NAME

    def fill(self) -> None:
        """Has it there in full.  Raises OSError; without room for all of it, it stays as it is."""
        if self._size() == SIZE:
            return
        fd = os.open(self._path, _HOW, _MODE)
        try:
            os.posix_fallocate(fd, 0, SIZE)
            os.ftruncate(fd, SIZE)
        finally:
            os.close(fd)
            if self._size() == 0:
                self._path.unlink()

    def release(self) -> bool:
        """Gives up a part of its room, and in the end its inode; False if there was none."""
        try:
            if (size := self._size()) > STEP:
                os.truncate(self._path, size - STEP)
            else:
                self._path.unlink()
        except OSError:
            return False
        return True

    def _size(self) -> int:
        """Bytes; none if there is no such file."""
        try:
            return self._path.lstat().st_size
        except FileNotFoundError:
            return 0
