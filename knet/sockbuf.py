"""The size of a socket's send or receive buffer, as far as the kernel grants it."""

import socket
from enum import IntEnum


class Direction(IntEnum):
    """Each buffer by the option that goes over the host's limit (asm-generic/socket.h)."""

    SENDING = 32
    RECEIVING = 33


_WITHIN = {
    Direction.SENDING: socket.SO_SNDBUF,
    Direction.RECEIVING: socket.SO_RCVBUF,
}


def enlarge(sock: socket.socket, direction: Direction, size: int) -> int:
    """Asks for `size` bytes; returns how many the buffer has now.

    Above net.core.rmem_max and wmem_max this needs CAP_NET_ADMIN outside of any user namespace
    (sockopt_capable, net/core/sock.c); without it the buffer gets what these allow.

    Raises OSError.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, direction, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, _WITHIN[direction], size)
    # The kernel counts what it needs beside the data, and so doubles the number (socket(7)).
    return sock.getsockopt(socket.SOL_SOCKET, _WITHIN[direction]) // 2
