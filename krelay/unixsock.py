"""Unix sockets that the daemon listens on: where they lie, who may connect, and who that is.

The files' modes let in root and the group `krelay`; peers are asked for by SO_PEERCRED (unix(7)) as
well, since a directory may be shared in ways that modes don't tell.
"""

import errno
import grp
import os
import pwd
import select
import socket
import stat
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from krelay.loop import Loop, Timer

GROUP = "krelay"
"""Whose members may connect, where this group exists."""
MODE = 0o660
BACKLOG = 64
PAUSE = 1.0
"""Seconds without accepting when there is no descriptor left."""

_NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class Peer(NamedTuple):
    """The process at the other end, as it was when it connected."""

    pid: int
    uid: int
    gid: int

    def may_connect(self, group: int | None = None) -> bool:
        """Whether it is root, our own user, or of this group, by default of GROUP."""
        group = _group() if group is None else group
        if self.uid in (0, os.geteuid()) or (group is not None and self.gid == group):
            return True
        try:
            name = pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return False
        return group is not None and group in os.getgrouplist(name, self.gid)


class UnixListener:
    """Listens at `path`, in place of a stale socket; `accepted` gets the connections.

    They are non-blocking, and from peers that may connect; others are hung up on.  `group` is whose
    members may, in place of GROUP's.  Raises OSError if it can't listen.
    """

    def __init__(
        self,
        loop: Loop,
        path: Path,
        kind: socket.SocketKind,
        accepted: Callable[[socket.socket, Peer], object],
        group: int | None = None,
    ) -> None:
        self._loop = loop
        self._group = group
        self._path = path
        self._accepted = accepted
        self._kind = kind
        self._resuming: Timer | None = None
        self._listen()

    @property
    def path(self) -> Path:
        """Where it listens."""
        return self._path

    def renew(self) -> None:
        """Listens anew, if its path leads elsewhere by now; connections stay.

        Raises OSError if it can't; it then goes on where it was.
        """
        if self._is_in_place():
            return
        before = self._socket
        self._listen()
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
        self._loop.remove(before.fileno())
        before.close()

    def close(self) -> None:
        """Stops listening and removes the socket, if its path leads to it; connections stay."""
        if self._resuming is not None:
            self._resuming.cancel()
        self._loop.remove(self._socket.fileno())
        self._socket.close()
        del self._accepted  # a circle with its owner, and the collector is off
        with suppress(OSError):  # the file system can't be written: it stays
            if self._is_in_place():
                self._path.unlink()

    def _listen(self) -> None:
        self._socket = _listening(self._path, self._kind, self._group)
        found = self._path.lstat()
        self._inode = (found.st_dev, found.st_ino)
        self._loop.add(self._socket.fileno(), select.EPOLLIN, self._ready)

    def _is_in_place(self) -> bool:
        try:
            found = self._path.lstat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._inode

    def _ready(self, _: int) -> None:
        try:
            connection, _address = self._socket.accept()
        except OSError as error:
            if error.errno in _NO_ROOM:  # it would be ready, in vain, again and again
                self._loop.modify(self._socket.fileno(), 0)
                self._resuming = self._loop.call_at(self._loop.now + PAUSE, self._resume)
            return
        peer = _peer(connection)
        if peer.may_connect(self._group):
            connection.setblocking(False)
            self._accepted(connection, peer)
        else:
            connection.close()

    def _resume(self) -> None:
        self._resuming = None
        self._loop.modify(self._socket.fileno(), select.EPOLLIN)


def _listening(path: Path, kind: socket.SocketKind, group: int | None) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
    try:
        _make_way(path)
        before = os.umask(0o777)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
        group = _group() if group is None else group
        if group is not None:
            os.chown(path, -1, group)
        os.chmod(path, MODE if group is not None else MODE & 0o700)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def _make_way(path: Path) -> None:
    """Removes a stale socket; what is none isn't ours to remove."""
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(
                errno.EEXIST, f"{path} is in the way and no socket; remove it", str(path)
            )
        path.unlink()


def _peer(connection: socket.socket) -> Peer:
    layout = struct.Struct("3i")
    return Peer(
        *layout.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))
    )


def _group() -> int | None:
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None
