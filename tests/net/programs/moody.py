"""A server whose manners the client chooses: `moody.py PORT`, on the loopback.

The first byte of a connection says what it is to be, and comes back:

    e   echoes what follows
    f   floods: sends as fast as it can, and never reads again
    d   deaf: neither reads nor sends ever again

For each connection that has ended a line tells how, as seen from here: `closed` or `reset`.
"""

import os
import select
import socket
import sys

ECHO, FLOOD, DEAF = b"e", b"f", b"d"
_BLOCK = bytes(1 << 16)
_MSS, _ROOM = 1460, 1 << 15
"""As on an Ethernet, and small.

What nobody reads fills the kernel's buffers, which grow with the segments; a thousand of the
loopback's size are more than it may have for all of TCP, and then everybody suffers.
"""
_HANGUP = select.EPOLLERR | select.EPOLLHUP


def main(port: int) -> None:
    """Serves until it is killed."""
    connections: dict[int, tuple[socket.socket, bytes]] = {}
    with socket.socket() as listener, select.epoll() as poll:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        be_small(listener)
        listener.bind(("127.0.0.1", port))
        listener.listen(4096)
        poll.register(listener, select.EPOLLIN)
        while True:
            for number, events in poll.poll():
                if number == listener.fileno():
                    connection, _ = listener.accept()
                    connection.setblocking(False)
                    connections[connection.fileno()] = connection, b""
                    poll.register(connection, select.EPOLLIN)
                    continue
                connection, mood = connections[number]
                try:
                    if events & _HANGUP and (error := _error_of(connection)):
                        raise OSError(error, os.strerror(error))
                    if not mood:
                        mood = connection.recv(1)
                        connection.send(mood)
                        connections[number] = connection, mood
                        _begin(poll, connection, mood)
                    elif mood == FLOOD:
                        connection.send(_BLOCK)
                    elif mood == ECHO:
                        mood = connection.recv(4096)
                        connection.send(mood)
                except BlockingIOError:
                    continue
                except OSError:
                    os.write(1, b"reset\n")
                else:
                    if mood:
                        continue
                    os.write(1, b"closed\n")
                connections.pop(number)[0].close()


def be_small(sock: socket.socket) -> None:
    """Before it connects or listens."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, _MSS)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _ROOM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _ROOM)


def _begin(poll: select.epoll, connection: socket.socket, mood: bytes) -> None:
    if mood == FLOOD:
        poll.modify(connection, select.EPOLLOUT)
    elif mood == DEAF:
        poll.modify(connection, 0)  # an error is always told


def _error_of(connection: socket.socket) -> int:
    return connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


if __name__ == "__main__":
    main(int(sys.argv[1]))
