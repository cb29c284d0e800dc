"""Sends back what comes, on as many connections as there are: `echo.py PORT`.

One process, one epoll.  An answer is as short as a request, so it always fits into a socket that
the client reads from.
"""

import select
import socket
import sys

_SIZE = 4096


def main(port: int) -> None:
    """Serves until it is killed."""
    connections: dict[int, socket.socket] = {}
    with socket.create_server(("", port), backlog=4096) as listener, select.epoll() as poll:
        poll.register(listener, select.EPOLLIN)
        while True:
            for number, _ in poll.poll():
                if number == listener.fileno():
                    connection, _ = listener.accept()
                    connections[connection.fileno()] = connection
                    poll.register(connection, select.EPOLLIN)
                elif not _echoed(connections[number]):
                    connections.pop(number).close()


def _echoed(connection: socket.socket) -> bool:
    try:
        data = connection.recv(_SIZE)
        connection.sendall(data)
    except OSError:  # reset by the client
        return False
    return bool(data)


if __name__ == "__main__":
    main(int(sys.argv[1]))
