"""Moves bytes upstream, as many as will go, at as little cost to either end as there can be.

    bulk.py sink PORT                           takes all there is, of one client after the other
    bulk.py send ADDRESS PORT SECONDS FILE      sends the file over and over, then asks

The sink answers, once the sender has ended its half, with the client's address and the number of
bytes that came.  `send` prints that and the seconds from the first byte to the answer, so that
what waits in buffers at the end counts like the rest.

Neither end copies: sendfile(2) hands the pages of the file on, and MSG_TRUNC lets the kernel throw
away what the sink asks for (tcp(7)).  So what is between the two has the most of the machine.
"""

import os
import socket
import sys
import time
from pathlib import Path

CHUNK = 1 << 20
_PATIENCE = 30.0
"""Seconds without progress after which the way counts as stuck."""


def sink(port: int) -> None:
    """Serves until it is killed."""
    nowhere = bytearray(CHUNK)
    with socket.create_server(("", port), backlog=64) as listener:
        while True:
            connection, (address, _) = listener.accept()
            with connection:
                connection.settimeout(_PATIENCE)
                try:
                    came = _discard(connection, nowhere)
                    connection.sendall(f"{address} {came}\n".encode())
                except OSError as error:  # the next client has a sound connection again
                    print(f"{address}: {error}", flush=True)


def _discard(connection: socket.socket, nowhere: bytearray) -> int:
    total = 0
    while count := connection.recv_into(nowhere, CHUNK, socket.MSG_TRUNC):
        total += count
    return total


def send(to: tuple[str, int], seconds: float, file: Path) -> str:
    """Sends for so many seconds; the sink's answer, and the seconds until it came."""
    with file.open("rb") as source, socket.create_connection(to, timeout=_PATIENCE) as connection:
        size = os.fstat(source.fileno()).st_size
        connection.setblocking(True)
        began, sent = time.monotonic(), 0
        while time.monotonic() < began + seconds:
            sent += os.sendfile(connection.fileno(), source.fileno(), sent % size, CHUNK)
        connection.shutdown(socket.SHUT_WR)
        connection.settimeout(_PATIENCE)
        answer = connection.makefile().readline().strip()
        took = time.monotonic() - began
    if answer.rpartition(" ")[2] != str(sent):
        raise SystemExit(f"{sent} bytes were sent, the sink says {answer!r}")
    return f"{answer} {took}"


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["sink", port]:
            sink(int(port))
        case ["send", address, port, seconds, file]:
            print(send((address, int(port)), float(seconds), Path(file)))
        case _:
            sys.exit(__doc__)
