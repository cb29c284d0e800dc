"""Room for what waits at a socket, as much of it as the kernel grants."""

import socket
from enum import IntEnum


class Direction(IntEnum):
    """Each by the option that goes over the host's limit (asm-generic/socket.h)."""

    SENDING = 32
    RECEIVING = 33


_WITHIN = {
    Direction.SENDING: socket.SO_SNDBUF,
    Direction.RECEIVING: socket.SO_RCVBUF,
}


def enlarge(sock: socket.socket, direction: Direction, size: int) -> int:
    """Asks for `size` bytes; how many there are now.

    Over net.core.rmem_max and wmem_max goes only who has CAP_NET_ADMIN outside of any user
    namespace (sockopt_capable, net/core/sock.c); others get what these allow.  Raises OSError.
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, direction, size)
    except PermissionError:
        sock.setsockopt(socket.SOL_SOCKET, _WITHIN[direction], size)
    # The kernel counts what it needs beside the data, and so doubles the number (socket(7)).
    return sock.getsockopt(socket.SOL_SOCKET, _WITHIN[direction]) // 2
