"""The two sockets of one pair, and the bytes between them.

Each socket is registered once, edge-triggered, for everything, and never touched again: what an
event says goes into the pair as a fact, and what is to be done follows from the facts (half.py).  A
turn moves a bounded number of bytes; what is left to do then waits for the next turn of the loop,
behind everybody else, so that one fast connection can't starve a thousand slow ones.

recv and send, not splice: for messages below some tens of kilobytes one copy each way is cheaper
than two pipes per connection and twice the system calls.

How a pair ends: sockets come with SO_LINGER on for 0 seconds (listener.py), so closing one resets
its connection, also when it is the kernel that closes because this process was killed: nobody must
take half a file for the whole.  Only when both ends of file were passed on is that switched off;
both are closed in order and the kernel delivers what it still has.  When one side fails (reset,
timed out), the other is reset, because that is what its peer would have seen without a relay; bytes
that were read by then are lost, as those in flight would be.  An error doesn't hide bytes that came
before it: tcp_recvmsg gives those first, so a turn is run before the error is asked for.
"""

import errno
import os
import select
import socket
from typing import Protocol

from krelay.loop import Loop
from tcp_relay.half import CHUNK, LIMIT, Half, Todo
from tcp_relay.listener import IN_ORDER
from tcp_relay.pair import Pair, Side

STEPS = 2 * LIMIT // CHUNK
"""Calls per direction and turn: as many bytes as a half may hold, read and written."""

_MASK = select.EPOLLIN | select.EPOLLPRI | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
_READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
_HINT = _READ & ~select.EPOLLIN
_FAILED = select.EPOLLERR | select.EPOLLHUP


class Owner(Protocol):
    """Whoever wants to know how a pump fares.  `ended` is the last call."""

    def connected(self) -> None:
        """The server has accepted; bytes move from now on."""

    def connect_failed(self, error: int) -> None:
        """The server can't be reached (an errno).

        The client's socket is still there: connect another, or abort.
        """

    def ended(self, reason: str) -> None:
        """Both sockets are closed."""


class Pump:
    """Owns a client's socket and, from `use_server` on, a server's; closes both together.

    Both have the options of listener.set_options.
    """

    __slots__ = (
        "_client",
        "_loop",
        "_owner",
        "_queued",
        "_registered",
        "_server",
        "alive",
        "is_connected",
        "pair",
    )

    def __init__(self, loop: Loop, owner: Owner, client: socket.socket) -> None:
        client.setblocking(False)
        self.pair = Pair()
        self.alive = True
        self.is_connected = False
        self._loop = loop
        self._owner = owner
        self._client = client
        self._server: socket.socket | None = None
        self._registered = False  # the server's socket, in the loop
        self._queued = False
        loop.add(client.fileno(), _MASK, self._on_client)

    def use_server(self, server: socket.socket) -> None:
        """Takes over a socket that isn't connected yet; one taken before is closed."""
        self.drop_server()
        server.setblocking(False)
        self._server = server

    def drop_server(self) -> None:
        """Closes the server's socket, which isn't connected (any more)."""
        if self._server is not None:
            if self._registered:
                self._loop.remove(self._server.fileno())
            self._server.close()
            self._server, self._registered = None, False

    def connect(self, address: tuple[str, int]) -> None:
        """Begins to connect the server's socket.  Raises OSError where that fails at once."""
        server = self._server
        assert server is not None
        error = server.connect_ex(address)
        if error not in _UNDER_WAY:
            raise OSError(error, os.strerror(error))
        # Not before: an unconnected socket reports HUP.
        self._loop.add(server.fileno(), _MASK, self._on_server)
        self._registered = True

    def abort(self) -> None:
        """Resets both sides.  The owner isn't told: it knows."""
        if self.alive:
            self._close()

    def _on_client(self, events: int) -> None:
        self.pair.ready(
            Side.CLIENT, events & _READ != 0, events & select.EPOLLOUT != 0, events & _HINT != 0
        )
        if self.is_connected:
            if not self._queued:
                self._turn()
            if events & select.EPOLLERR and self.alive:
                self._failed(Side.CLIENT, _error_of(self._client))
        elif events & _FAILED:
            self._failed(Side.CLIENT, _error_of(self._client))

    def _on_server(self, events: int) -> None:
        server = self._server
        assert server is not None
        if not self.is_connected:
            if error := _error_of(server):
                self._owner.connect_failed(error)
                return
            if not events & select.EPOLLOUT:
                return
            self.is_connected = True
            self._owner.connected()
        self.pair.ready(
            Side.SERVER, events & _READ != 0, events & select.EPOLLOUT != 0, events & _HINT != 0
        )
        if not self._queued:
            self._turn()
        if events & select.EPOLLERR and self.alive:
            self._failed(Side.SERVER, _error_of(server))

    def _turn(self) -> None:
        up, down = self.pair.up, self.pair.down
        client, server = self._client, self._server
        assert server is not None
        more = up.todo() is not Todo.WAIT and self._move(up, client, server, Side.CLIENT)
        if self.alive and down.todo() is not Todo.WAIT:
            more |= self._move(down, server, client, Side.SERVER)
        if not self.alive:
            return
        if up.sent_eof and down.sent_eof:
            for sock in (client, server):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, IN_ORDER)
            self._close()
            self._owner.ended("closed")
        elif more:
            self._queued = True
            self._loop.call_soon(self._queued_turn)

    def _queued_turn(self) -> None:
        self._queued = False
        if self.alive:
            self._turn()

    def _move(self, half: Half, source: socket.socket, sink: socket.socket, side: Side) -> bool:
        """Whether there is more to do, after as much as one turn may."""
        todo = half.todo
        at = side
        try:
            for _ in range(STEPS):
                step = todo()
                if step is Todo.READ:
                    at, room = side, half.room
                    try:
                        half.got(source.recv(room), room)
                    except BlockingIOError:
                        half.empty()
                elif step is Todo.WRITE:
                    at = _OTHER[side]
                    try:
                        half.sent(sink.send(half.held))
                    except BlockingIOError:
                        half.full()
                elif step is Todo.SHUT:
                    at = _OTHER[side]
                    sink.shutdown(socket.SHUT_WR)
                    half.shut()
                else:
                    return False
        except OSError as error:
            self._failed(at, error.errno or 0)
            return False
        return todo() is not Todo.WAIT

    def _failed(self, side: Side, error: int) -> None:
        """One side failed with that errno; 0 is a stale word of something dealt with already."""
        if error:
            self.abort()
            self._owner.ended(f"{side}: {os.strerror(error).lower()}")

    def _close(self) -> None:
        self.alive = False
        self._loop.remove(self._client.fileno())
        self._client.close()
        self.drop_server()


def _error_of(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


_OTHER = (Side.SERVER, Side.CLIENT)
_UNDER_WAY = (0, errno.EINPROGRESS)
