"""Where log lines go: to a descriptor that others read, without ever waiting for them.

Who reads a log can stall: a log shipper that hangs, a journal that was stopped, a terminal held by
Ctrl-S.  A pipe is full after 64 KB, and then a write waits.  A daemon that waits for that serves
nobody; so what can't be written now is lost, and counted.

Whether a write waits is a matter of the open file description (O_NONBLOCK, open(2)), which other
programs share, a user's shell among them.  So that of a pipe or a terminal is not changed: it is
opened once more, by /proc/self/fd.  A socket is told with each write (MSG_DONTWAIT).  A file on a
disk is written as it is.
"""

import os
import select
import socket
import stat
from collections.abc import Callable
from functools import partial


class Sink:
    """The end of a log that a descriptor leads to, which stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._write, self._close = _writer(fd)
        self._rest = b""
        """Of a line that went only in part."""

    def write(self, line: bytes) -> bool:
        """Whether it is written, now or with the next.  Raises nothing, and never waits."""
        data = self._rest + line
        try:
            count = self._write(data)
        except OSError:  # full, or nobody is there
            count = 0
        if count <= len(self._rest) < len(data):
            self._rest = self._rest[count:]
            return False
        self._rest = data[count:]
        return True

    def close(self) -> None:
        """Lets go of what was opened for it."""
        self._close()


def _writer(fd: int) -> tuple[Callable[[bytes], int], Callable[[], object]]:
    """How to write there, and how to end that."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        end = socket.socket(fileno=os.dup(fd))
        at_once = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        return lambda data: end.send(data, at_once), end.close
    if stat.S_ISFIFO(mode) or os.isatty(fd):
        try:
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            own = os.open(f"/proc/self/fd/{fd}", flags)
        except OSError:  # another user's
            return _careful(fd), lambda: None
        return partial(os.write, own), partial(os.close, own)
    return partial(os.write, fd), lambda: None


def _careful(fd: int) -> Callable[[bytes], int]:
    """Asks before each write, which may still wait if another program is faster."""
    room = select.poll()
    room.register(fd, select.POLLOUT)

    def write(data: bytes) -> int:
        if not room.poll(0):
            return 0
        return os.write(fd, data[: select.PIPE_BUF])

    return write
