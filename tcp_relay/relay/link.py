"""The client side of the relay socket: one packet a message, reconnecting by itself.

What is to be sent waits in a queue of messages, not of bytes, and is encoded only when the socket
takes it: after a reconnect ten thousand connections are resumed, and neither the socket's buffer
nor the turn should be filled by them. When the link is lost the queue is thrown away, because the
whole state is told anew on the next one (`LinkUser.link_up`).

A descriptor may go with a message (unix(7), SCM_RIGHTS).  Its socket is asked for it when the
message is sent; where the socket has been closed meanwhile, the message is left out.

The link knows nothing of connections.  It warns once when it isn't connected to krelay, and once
when a message is malformed, not ten times a second while that lasts.
"""

import array
import errno
import select
import socket
from collections import deque
from pathlib import Path
from typing import Protocol, TypeAlias

from knet.log import Failures, Log
from knet.loop import Loop, Timer
from knet.roles import RELAY
from krelay.registration.messages import (
    MAX_MESSAGE,
    Answer,
    BadMessage,
    Request,
    emit,
    parse_answer,
)
from tcp_relay.engine.sockets import HOST_FAILS, Socket, close

RETRY = 0.1
"""Seconds between attempts to connect."""

PER_TURN = 64
"""Messages sent or received per turn."""

CLOSING = 1.0
"""Seconds that closing may wait for krelay to read what is still to be sent."""

_With: TypeAlias = tuple[Request, Socket]

log = Log("link")


class LinkUser(Protocol):
    """The user of the link."""

    def link_up(self) -> None:
        """Connected to krelay (again), which may know nothing of what was said before."""

    def link_down(self) -> None:
        """Not connected to krelay any more; what was asked stays unanswered."""

    def answered(self, answer: Answer) -> None:
        """krelay sent this.  Raises BadMessage if it can't be meant."""


class RelayLink:
    """Connects to the relay socket at `path` with the next turn, and again when it is lost."""

    def __init__(self, loop: Loop, path: Path, user: LinkUser) -> None:
        self._loop = loop
        self._path = path
        self._user = user
        self._socket: socket.socket | None = None
        self._queue: deque[Request | _With] = deque()
        self._is_watching_out = False
        self._failures = Failures(log)
        self._told_unconnected = False
        self._told_malformed = False  # since the last message that was well-formed
        self._timer: Timer = loop.call_at(loop.now, self._connect)

    @property
    def is_up(self) -> bool:
        """Connected to krelay."""
        return self._socket is not None

    def send(self, message: Request) -> None:
        """Sends this, in order.

        While the link is down it does nothing: `link_up` will ask for everything.
        """
        if self._socket is None:
            return
        self._queue.append(message)
        if not self._is_watching_out:
            self._drain()

    def send_with(self, message: Request, sock: Socket) -> None:
        """Sends this in its turn, and hands over this socket."""
        if self._socket is None:
            return
        self._queue.append((message, sock))
        if not self._is_watching_out:
            self._drain()

    def close(self) -> None:
        """Sends what is still to be sent, if krelay reads it, and closes the link."""
        self._timer.cancel()
        sock, self._socket = self._socket, None
        if sock is None:
            return
        self._loop.remove(sock.fileno())
        with sock:
            sock.settimeout(CLOSING)
            try:
                for message in self._queue:
                    _send(sock, message)
            except OSError:
                pass
        self._queue.clear()

    def _connect(self) -> None:
        try:
            sock = socket.socket(
                socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
            )
            try:
                sock.connect(str(self._path))
                self._loop.add(sock.fileno(), select.EPOLLIN, self._ready)
            except BaseException:
                close(sock)
                raise
        except OSError as error:
            self._not_connected(_REASON.get(error.errno or 0) or error.strerror or str(error))
            return
        self._socket = sock
        self._is_watching_out = False
        if self._told_unconnected:
            self._told_unconnected = False
            log.info("connected to krelay", socket=self._path)
        self._user.link_up()

    def _not_connected(self, reason: str) -> None:
        self._timer = self._loop.call_at(self._loop.now + RETRY, self._connect)
        if not (self._told_unconnected or self._told_malformed):
            self._told_unconnected = True
            log.warning("not connected to krelay", socket=self._path, reason=reason)

    def _lost(self, reason: str) -> None:
        sock, self._socket = self._socket, None
        assert sock is not None
        self._loop.remove(sock.fileno())
        close(sock)
        self._queue.clear()
        self._user.link_down()
        self._not_connected(reason)

    def _ready(self, events: int) -> None:
        if events & select.EPOLLOUT:
            self._drain()
        if events & ~select.EPOLLOUT and self._socket is not None:
            self._receive()

    def _receive(self) -> None:
        for _ in range(PER_TURN):
            if self._socket is None:
                return
            try:
                packet = self._socket.recv(MAX_MESSAGE + 1)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in HOST_FAILS:  # it goes on; krelay has lost nothing
                    self._failures.tell(self._loop.now, "can't receive from krelay", error)
                else:
                    self._lost(error.strerror or str(error))
                return
            if not packet:
                self._lost("it closed the relay socket")
                return
            try:
                self._user.answered(parse_answer(packet))
            except BadMessage as error:
                if not self._told_malformed:
                    self._told_malformed = True
                    log.error("malformed message from krelay", socket=self._path, error=error)
                self._lost("malformed message")
                return
            self._told_malformed = False

    def _drain(self) -> None:
        sock, queue = self._socket, self._queue
        if sock is None:
            return
        try:
            for _ in range(PER_TURN):
                if not queue:
                    break
                _send(sock, queue[0])
                queue.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            # Not from within `send`, whose caller is in the middle of something: as an event, soon.
            if error.errno not in _GONE:
                self._failures.tell(self._loop.now, "can't send to krelay", error)
            if error.errno not in HOST_FAILS:
                queue.clear()
        self._watch_out(sock)

    def _watch_out(self, sock: socket.socket) -> None:
        """Waits for room for what is still to be sent."""
        if bool(self._queue) == self._is_watching_out:
            return
        out = select.EPOLLOUT if self._queue else 0
        try:
            self._loop.modify(sock.fileno(), select.EPOLLIN | out)
        except OSError as error:
            self._failures.tell(self._loop.now, "can't wait for krelay", error)
            self._loop.call_at(self._loop.now + RETRY, self._drain)
        else:
            self._is_watching_out = bool(self._queue)


def _send(sock: socket.socket, message: Request | _With) -> None:
    if not isinstance(message, tuple):
        sock.send(emit(message))
        return
    request, handed = message
    if (descriptor := handed.fileno()) >= 0:
        rights = array.array("i", [descriptor])
        sock.sendmsg([emit(request)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


_REASON = {
    errno.ENOENT: "there is no relay socket",
    errno.ECONNREFUSED: "no process listens on it",
    errno.EACCES: f"this user may not use it; start tcp-relay in the group {RELAY.group}",
}
_GONE = (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN)
