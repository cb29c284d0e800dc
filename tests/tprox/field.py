"""Where phases are played: a server, ways to it, and pairs of connected ends.

A client's first bytes are its ticket, and the server's side waits under that ticket: so both ends
of one connection get together whatever a proxy does to the order of connections.
"""

import random
import select
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from tests.tprox.ends import End, Failure

TICKET = 8
SMALL = 1 << 16
"""Bytes asked for as buffers of the tester's own sockets.

Small, for floods to be over soon; not smaller than the window that Linux gives a new connection,
which can't be taken back.
"""


@dataclass(frozen=True, slots=True)
class Ground:
    """How to listen behind the proxy, and to connect in front of it: whole sockets, blocking.

    `connect_chained` goes through two proxies, if there are two.
    """

    listen: Callable[[], socket.socket]
    connect: Callable[[], socket.socket]
    connect_chained: Callable[[], socket.socket]


class Field:
    """The server, for the duration of a `with` block; threads may share it."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._listener = ground.listen()
        self._changed = threading.Condition()
        self._arrived: dict[bytes, socket.socket] = {}
        self._sockets: set[socket.socket] = set()
        self._cut = False
        self._greeters = ThreadPoolExecutor(64)
        self._accepting = threading.Thread(target=self._accept)

    def __enter__(self) -> Self:
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        self._greeters.shutdown()
        for sock in self._sockets:
            sock.close()

    @property
    def port(self) -> int:
        """The server's."""
        port: int = self._listener.getsockname()[1]
        return port

    def cut(self) -> None:
        """Whoever uses a connection of this field fails soon, and no new ones are made."""
        with self._changed:
            self._cut = True
            cut(self._sockets)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            if self._keep(sock):
                self._greeters.submit(self._greet, sock)

    def _keep(self, sock: socket.socket) -> bool:
        with self._changed:
            if self._cut:
                sock.close()
            else:
                self._sockets = {kept for kept in self._sockets if kept.fileno() >= 0}
                self._sockets.add(sock)
            return not self._cut

    def _greet(self, sock: socket.socket) -> None:
        ticket = b""
        sock.settimeout(10)
        with suppress(OSError):
            while len(ticket) < TICKET and (data := sock.recv(TICKET - len(ticket))):
                ticket += data
        with self._changed:
            if len(ticket) < TICKET:
                sock.close()
            self._arrived[ticket] = sock
            self._changed.notify_all()

    def pair(self, chained: bool, deadline: float) -> tuple[socket.socket, socket.socket]:
        """A client's socket and the server's of one connection.  Raises Failure."""
        began = time.monotonic()
        try:
            client = self._ground.connect_chained() if chained else self._ground.connect()
        except OSError as error:
            raise Failure(f"the client can't connect: {error}") from None
        if not self._keep(client):
            raise Failure("cut short")
        ticket = random.randbytes(TICKET)
        try:
            client.sendall(ticket)
        except OSError as error:
            raise Failure(f"{error.strerror} before it reached the server") from None
        while True:
            with self._changed:
                if self._changed.wait_for(lambda: ticket in self._arrived, 0.05):
                    return client, self._arrived.pop(ticket)
            if select.select([client], [], [], 0)[0]:
                raise Failure("the client's end was closed before it reached the server")
            if time.monotonic() > deadline:
                raise Failure(f"did not reach the server within {deadline - began:.0f} s")


class Stage:
    """The field as one phase uses it: numbered connections, and one deadline for all of them."""

    def __init__(self, field: Field, patience: float, stall: float, chained: bool = False) -> None:
        self.stall = stall
        self._field = field
        self._patience = patience
        self._deadline = time.monotonic() + patience
        self._chained = chained
        self._number = 0
        self._ends: list[End] = []
        self._first: BaseException | None = None  # what everything else was cut for

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for end in self._ends:
            if end.sock.fileno() >= 0:
                end.reset()

    def pair(self) -> tuple[End, End]:
        """A new connection: the client's end and the server's."""
        self._number += 1
        name = f"connection {self._number}"
        deadline = min(self._deadline, time.monotonic() + 10)
        try:
            client, server = self._field.pair(self._chained, deadline)
        except Failure as failure:
            raise Failure(f"{name}: {failure}") from None
        ends = (
            End(client, f"{name}, client", self._patience, self._deadline),
            End(server, f"{name}, server", self._patience, self._deadline),
        )
        self._ends += ends
        return ends

    def together(self, *calls: Callable[[], object]) -> None:
        """Makes these calls at the same time; the first failure ends the others, and is raised."""
        with ThreadPoolExecutor(len(calls)) as threads:
            running = [threads.submit(call) for call in calls]
            try:
                done, late = wait(running, return_when=FIRST_EXCEPTION)
            except BaseException:
                self._cut()
                raise
            if late:
                failures = (future.exception() for future in done)
                self._first = self._first or next(filter(None, failures))
                self._cut()
        # Calls within calls cut as well: what failed because of a cut is not the reason.
        if self._first:
            raise self._first
        for future in done:
            future.result()

    def _cut(self) -> None:
        cut({end.sock for end in self._ends})


def cut(sockets: set[socket.socket]) -> None:
    """Ends these connections; whoever waits for one of them wakes up."""
    for sock in sockets:
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)


def small_buffers(end: End) -> End:
    """The same end, whose kernel holds little."""
    end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
    end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    return end
