"""The relay socket itself: SEQPACKET, one message a packet, any number of tcp-relays.

A malformed message gets an error and ends that connection.  A tcp-relay that doesn't read its
answers is disconnected once its buffer is full: it will reconnect and resume.
"""

import select
import socket
import struct
from contextlib import suppress
from pathlib import Path

from krelay.controlsock import listening_socket, may_connect
from krelay.log import Log
from krelay.loop import Loop
from krelay.relay import Relays
from krelay.relaymsg import MAX_MESSAGE, Answer, BadMessage, Refused, emit, parse_request

MAX_PER_TURN = 64
SEND_BUFFER = 4 << 20

_log = Log("relays")


class RelaySocket:
    """Listens at `path` and answers tcp-relays from `relays`.

    Raises OSError if it can't listen.
    """

    def __init__(self, loop: Loop, path: Path, relays: Relays) -> None:
        self._loop = loop
        self._path = path
        self._relays = relays
        self._links: set[_Link] = set()
        self._listener = listening_socket(path, socket.SOCK_SEQPACKET, 0o660)
        loop.add(self._listener.fileno(), select.EPOLLIN, self._accept)

    @property
    def pids(self) -> frozenset[int]:
        """The processes that are connected."""
        return frozenset(link.pid for link in self._links)

    def close(self) -> None:
        """Ends all connections and removes the socket."""
        for link in list(self._links):
            link.close()
        self._loop.remove(self._listener.fileno())
        self._listener.close()
        with suppress(FileNotFoundError):
            self._path.unlink()

    def _accept(self, _: int) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError:
            return
        if not may_connect(connection):
            connection.close()
            return
        connection.setblocking(False)
        link = _Link(self._loop, connection, self._relays, self._links)
        _log.info("tcp-relay connected", pid=link.pid)


class _Link:
    def __init__(
        self, loop: Loop, connection: socket.socket, relays: Relays, links: "set[_Link]"
    ) -> None:
        self._loop = loop
        self._socket = connection
        self._relays = relays
        self._links = links
        self._send = self.send  # one object: rows are recognised by it
        credentials = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
        )
        self.pid: int = struct.unpack("3i", credentials)[0]
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        links.add(self)
        loop.add(connection.fileno(), select.EPOLLIN, self._ready)

    def send(self, answer: Answer) -> None:
        if self not in self._links:
            return
        try:
            self._socket.send(emit(answer))
        except OSError:
            # Full or gone; not closed here, where a caller may be in the middle of its rows.
            self._loop.call_soon(self.close)

    def close(self) -> None:
        if self not in self._links:
            return
        self._links.remove(self)
        self._loop.remove(self._socket.fileno())
        self._socket.close()
        self._relays.lost(self._send, self._loop.now)
        del self._send  # a circle, and the collector is off
        _log.info("tcp-relay disconnected", pid=self.pid)

    def _ready(self, _: int) -> None:
        for _turn in range(MAX_PER_TURN):
            if self not in self._links:
                return
            try:
                packet = self._socket.recv(MAX_MESSAGE + 1)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            if not packet:
                self.close()
                return
            try:
                request = parse_request(packet)
            except BadMessage as error:
                _log.warning("malformed message from tcp-relay", pid=self.pid, error=error)
                self.send(Refused(None, str(error)))
                self.close()
                return
            answer = self._relays.handle(request, self._send, self._loop.now)
            if answer is not None:
                self.send(answer)
