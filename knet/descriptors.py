"""Descriptors that another process hands over by a Unix socket (SCM_RIGHTS, unix(7)).

Any process that may connect may hand over any file, and looking at it or closing it may take as
long as that process likes: `close` of a TCP socket that lingers (socket(7), SO_LINGER) waits for a
peer that it has chosen, also if the socket does not block; `close` of a file in its own file system
(FUSE) waits for its answer; and a call that takes a socket's lock (getsockname) waits for a `send`
that reads such a file.  So:

- `receive` has room for as many as a message can carry.  Where there is none, the kernel closes the
  rest itself, within that call.
- `cookie_of_listener` makes no call that takes the socket's lock.
- `close_apart` closes in a thread of its own, because a close may take any time.  So does `hang_up`
  with a connection, in which unread descriptors may lie.

A socket that is never to be handed anything says so (`refuse_descriptors`), as far as the kernel
can be told (SO_PASSRIGHTS, Linux 6.16).
"""

import array
import ctypes
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

MOST = 253
"""Descriptors in a message (net/scm.h, SCM_MAX_FD)."""
_ROOM = socket.CMSG_SPACE(4 * MOST)
_SO_DOMAIN, _SO_COOKIE, _SO_PASSRIGHTS = 39, 57, 83
"""asm-generic/socket.h; Python knows none of them."""
_getsockopt = ctypes.CDLL(None, use_errno=True).getsockopt


def receive(connection: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """A packet and the descriptors that came with it, the caller's from then on.

    Raises OSError as recv(2) does.
    """
    data, ancillary, _, _ = connection.recvmsg(size, _ROOM, socket.MSG_CMSG_CLOEXEC)
    if not ancillary:
        return data, []
    handed: list[int] = []
    for level, kind, value in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers = array.array("i")
            numbers.frombytes(value[: len(value) - len(value) % numbers.itemsize])
            handed += numbers
    return data, handed


def read(connection: socket.socket, size: int) -> bytes:
    """A packet; descriptors that came with it are closed.  Raises OSError as recv(2) does."""
    data, handed = receive(connection, size)
    close_all(handed)
    return data


def hang_up(connection: socket.socket) -> None:
    """Ends a connection, in which descriptors may lie unread."""
    with suppress(OSError):  # gone already
        connection.shutdown(socket.SHUT_RDWR)
    close_apart(connection.close)


def cookie_of_listener(descriptor: int) -> int | None:
    """The kernel's number of a TCP socket over IPv4 that listens; None for anything else."""
    is_one = (
        _option(descriptor, _SO_DOMAIN) == socket.AF_INET
        and _option(descriptor, socket.SO_TYPE) == socket.SOCK_STREAM
        and _option(descriptor, socket.SO_PROTOCOL) == socket.IPPROTO_TCP
        and _option(descriptor, socket.SO_ACCEPTCONN) == 1
    )
    return _option(descriptor, _SO_COOKIE, 8) if is_one else None


def close_apart(close: Callable[[], object]) -> None:
    """Calls this in a thread of its own, which keeps no process from ending.

    Here, where the host has no room for a thread.
    """
    try:
        threading.Thread(target=_quietly, args=(close,), daemon=True).start()
    except RuntimeError:
        _quietly(close)


def close_all(descriptors: Iterable[int]) -> None:
    """Closes what was handed over, apart."""
    if numbers := tuple(descriptors):
        close_apart(partial(_close_each, numbers))


def refuse_descriptors(connection: socket.socket) -> bool:
    """The kernel hands nothing over to this socket, nor to those that it accepts, from now on.

    False if it can't be told.
    """
    try:
        connection.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


def _close_each(numbers: Iterable[int]) -> None:
    for number in numbers:
        os.close(number)


def _quietly(close: Callable[[], object]) -> None:
    with suppress(OSError):
        close()


def _option(descriptor: int, name: int, size: int = 4) -> int | None:
    value, length = (ctypes.c_ubyte * size)(), ctypes.c_uint32(size)
    if _getsockopt(descriptor, socket.SOL_SOCKET, name, value, ctypes.byref(length)):
        return None
    return int.from_bytes(bytes(value), sys.byteorder)
