"""Sockets of both legs, and how they close.

Closing resets (SO_LINGER, 0 seconds), also when it is the kernel that closes because this process
was killed: nobody must take half a file for the whole.  Only for a pair that has ended in order is
that switched off.
"""

import fcntl
import os
import socket
import struct
from typing import Any, TypeAlias

Socket: TypeAlias = socket.SocketType
"""What socket.socket is made of; that one's constructor and `accept` take long, in Python."""

_RESETTING = struct.pack("ii", 1, 0)  # struct linger: on, for 0 seconds
_IN_ORDER = struct.pack("ii", 0, 0)
_STREAM, _NONBLOCK = int(socket.SOCK_STREAM), int(socket.SOCK_NONBLOCK)
_SIOCOUTQ = 0x5411  # linux/sockios.h


def set_options(sock: Socket) -> None:
    """What both legs have.

    Small writes go at once, a dead peer is noticed, urgent bytes stay in the stream (RFC 6093), and
    closing resets.  Accepted sockets inherit all of it from the listening one.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESETTING)


def server_socket(family: int = socket.AF_INET) -> Socket:
    """A socket for a server leg."""
    sock = socket.SocketType(family, _STREAM | _NONBLOCK)
    set_options(sock)
    return sock


def accept(listening: Socket, family: int) -> tuple[Socket, tuple[Any, ...]]:
    """A client's socket and address.  Raises OSError as accept(2) does."""
    fd, peer = listening._accept()  # type: ignore[attr-defined]
    sock = socket.SocketType(family, _STREAM, 0, fd)
    sock.setblocking(False)
    return sock, peer


def close_in_order(sock: Socket) -> None:
    """Closes behind a FIN; the kernel goes on delivering what it still has."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _IN_ORDER)
    sock.close()


def undelivered(sock: Socket) -> int:
    """Bytes (and the FIN) that the kernel holds and the peer hasn't acknowledged."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), _SIOCOUTQ, b"\0\0\0\0"), "little")


def in_words(error: int | None) -> str:
    """An errno, as it stands in logs."""
    return os.strerror(error or 0).lower()
