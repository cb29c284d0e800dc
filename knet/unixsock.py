"""Unix sockets that the daemon listens on: where they lie, who may connect, and how often.

The file's mode lets in root and one group (roles.py); peers are asked for by SO_PEERCRED (unix(7))
as well, since a directory may be shared in ways that modes don't tell.  What counts is what the
kernel knows of the process when it connects: its user, its group and its supplementary groups
(SO_PEERGROUPS), as for the mode.  So a login from before its user was taken out of the group is
still in, as it is for files; a list of users is never looked into, which might take long.
The group's number is looked up when listening begins.

No user keeps others out.  Of the connections that a socket may have, a user who isn't root has at
most some, all of them together three quarters; and no connection is taken from the last
descriptors, which are for the daemon's own work.
"""

import ctypes
import errno
import grp
import os
import resource
import select
import socket
import stat
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from knet import descriptors
from knet.log import Log, Throttle
from knet.loop import Loop, Timer
from knet.roles import RELAY, Role, refusal

MODE = 0o660
BACKLOG = 1024
"""Connections that wait to be accepted; beyond these, a peer that won't wait is refused."""
PAUSE = 1.0
"""Seconds without accepting when the kernel has no room for one more."""
RESERVE = 32
"""Descriptors that no connection is taken from, the highest: the daemon's own work needs a dozen
at once.  A quarter of all where there are few."""
AT_ONCE = 16
"""Connections accepted in a turn of the loop: a millisecond."""
UNREAD = 64
"""Messages that are thrown away of one who is refused; the rest the kernel throws away."""

_GONE = (errno.EAGAIN, errno.ECONNABORTED, errno.EINTR)
_PEERGROUPS = 59
"""SO_PEERGROUPS (asm-generic/socket.h): the supplementary groups, a gid_t each."""
_MOST_GROUPS = 65536
"""NGROUPS_MAX (linux/limits.h)."""

_log = Log("sockets")


class Peer(NamedTuple):
    """The process at the other end, as it was when it connected."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()
    """Its supplementary groups."""

    @property
    def is_root(self) -> bool:
        """Whether it is root, or our own user."""
        return self.uid in (0, os.geteuid())

    def may_connect(self, group: int | None) -> bool:
        """Whether it is root, our own user, or of this group."""
        return self.is_root or (group is not None and (self.gid == group or group in self.groups))


class Crowd:
    """How many of something there are, by the user whose they are: `most` in all.

    A user other than root has `of_one` at most, and all of them together three quarters.

    >>> crowd = Crowd(most=4, of_one=2)
    >>> user, other, root = Peer(1, 1000, 1000), Peer(2, 1001, 1001), Peer(3, 0, 0)
    >>> [crowd.enter(user), crowd.enter(user), crowd.enter(user), crowd.enter(other)]
    [True, True, False, True]
    >>> [crowd.enter(Peer(4, 1002, 1002)), crowd.enter(root), crowd.enter(root)]
    [False, True, False]
    """

    def __init__(self, most: int, of_one: int) -> None:
        self.most = most
        self.of_one = of_one
        self._of: Counter[int] = Counter()
        self._roots = 0

    def enter(self, peer: Peer) -> bool:
        """Counts one more of this peer's; False if there is no room for it."""
        others = self._of.total()
        if others + self._roots >= self.most:
            return False
        if peer.is_root:
            self._roots += 1
            return True
        if others >= self.most * 3 // 4 or self._of[peer.uid] >= self.of_one:
            return False
        self._of[peer.uid] += 1
        return True

    def leave(self, peer: Peer) -> None:
        """One that had entered is no more."""
        if peer.is_root:
            self._roots -= 1
            return
        self._of[peer.uid] -= 1
        if not self._of[peer.uid]:
            del self._of[peer.uid]


class UnixListener:
    """Listens in `directory` for a role, in place of a stale socket; `accepted` gets connections.

    They are non-blocking, from peers that may connect, and entered into `crowd`: the code that
    closes one takes it out there.  Others are told why not, in a message that `worded` makes, and
    closed.  Raises OSError if it can't listen.
    """

    def __init__(
        self,
        loop: Loop,
        directory: Path,
        role: Role,
        kind: socket.SocketKind,
        accepted: Callable[[socket.socket, Peer], object],
        worded: Callable[[str], bytes],
        crowd: Crowd,
        group: int | None = None,
    ) -> None:
        """`group` is whose members may connect, in place of the role's."""
        self._loop = loop
        self._path = directory / role.socket
        self._role = role
        self._group = group_id(role.group) if group is None else group
        self._accepted = accepted
        self._worded = worded
        self._crowd = crowd
        self._warning = Throttle()
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
        listening = _listening(self._path, self._kind, self._group)
        refused = self._role is not RELAY and descriptors.refuse_descriptors(listening)
        self._takes_descriptors = not refused
        try:
            found = self._path.lstat()
            self._loop.add(listening.fileno(), select.EPOLLIN, self._ready)
        except OSError:
            listening.close()
            raise
        self._socket = listening
        self._inode = (found.st_dev, found.st_ino)

    def _is_in_place(self) -> bool:
        try:
            found = self._path.lstat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == self._inode

    def _ready(self, _: int) -> None:
        for _turn in range(AT_ONCE):
            try:
                connection, _address = self._socket.accept()
            except OSError as error:
                if error.errno not in _GONE:  # it would be ready, in vain, again and again
                    self._rest()
                    self._warn("a connection can't be accepted", error=error)
                return
            self._came(connection)

    def _came(self, connection: socket.socket) -> None:
        entered: Peer | None = None
        try:
            connection.setblocking(False)
            peer = _peer(connection)
            if (reason := self._why_not(connection, peer)) is not None:
                self._turn_away(connection, reason)
                return
            entered = peer
            self._accepted(connection, peer)
        except OSError as error:
            if entered is not None:
                self._crowd.leave(entered)
            with suppress(OSError):
                connection.close()
            self._warn("a connection is given up", error=error)

    def _why_not(self, connection: socket.socket, peer: Peer) -> str | None:
        """Why this one isn't served; None: it is, and has been entered."""
        if not peer.may_connect(self._group):
            return refusal(self._role, exists=self._group is not None)
        if connection.fileno() >= last_descriptor():
            self._warn("a connection is refused for want of descriptors", uid=peer.uid)
            return "krelay has no descriptor left for one more; try again later"
        if not self._crowd.enter(peer):
            self._warn("too many connections", uid=peer.uid, pid=peer.pid)
            return (
                f"there are too many connections to {self._role.socket}; a user has at most "
                f"{self._crowd.of_one}: close some"
            )
        return None

    def _turn_away(self, connection: socket.socket, reason: str) -> None:
        """Says why, and hangs up.

        What has come is read first: a peer that is closed with something unread gets an error
        before it gets the reason.
        """
        with suppress(OSError):
            connection.send(self._worded(reason))
            connection.shutdown(socket.SHUT_RD)
            for _ in range(UNREAD):
                if not descriptors.read(connection, 1 << 16):
                    break
        if self._takes_descriptors and connection.fileno() < last_descriptor():
            descriptors.hang_up(connection)
        else:
            connection.close()

    def _warn(self, message: str, **fields: object) -> None:
        if (before := self._warning.admit(self._loop.now)) is not None:
            _log.warning(message, socket=self._path, again=before or None, **fields)

    def _rest(self) -> None:
        self._loop.modify(self._socket.fileno(), 0)
        self._resuming = self._loop.call_at(self._loop.now + PAUSE, self._resume)

    def _resume(self) -> None:
        try:
            self._loop.modify(self._socket.fileno(), select.EPOLLIN)
            self._resuming = None
        except OSError:
            self._resuming = self._loop.call_at(self._loop.now + PAUSE, self._resume)


def group_id(name: str) -> int | None:
    """The number of this group; None if this host has none of that name."""
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


def last_descriptor() -> int:
    """The lowest number that no connection may have.

    Numbers are given out from below: one that is lower leaves those above to what needs them.
    """
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft - min(RESERVE, soft // 4)


def _listening(path: Path, kind: socket.SocketKind, group: int | None) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
    try:
        _make_way(path)
        before = os.umask(0o777)
        try:
            listener.bind(str(path))
        finally:
            os.umask(before)
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
    pid, uid, gid = layout.unpack(
        connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)
    )
    return Peer(pid, uid & 0xFFFFFFFF, gid & 0xFFFFFFFF, _groups(connection))


def _groups(connection: socket.socket) -> frozenset[int]:
    """The supplementary groups of the peer.  Raises OSError."""
    try:
        found = connection.getsockopt(socket.SOL_SOCKET, _PEERGROUPS, 1024)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        found = _long_option(connection, _PEERGROUPS, 4 * _MOST_GROUPS)
    return frozenset(each for (each,) in struct.iter_unpack("=I", found))


def _long_option(connection: socket.socket, option: int, most: int) -> bytes:
    """A socket option of more bytes than `getsockopt` takes here.  Raises OSError."""
    room, length = ctypes.create_string_buffer(most), ctypes.c_uint32(most)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getsockopt(connection.fileno(), socket.SOL_SOCKET, option, room, ctypes.byref(length)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return room.raw[: length.value]
