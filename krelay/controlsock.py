"""The control socket itself: lines in and out for clients, none of whom can hold us up.

A client has a bounded buffer in either direction.  Lines of an answer are made only as fast as the
client takes them; a tracing client that is too slow loses lines and is told how many.  Who says
nothing and has asked for nothing, or doesn't read, for IDLE seconds is dropped.
"""

import select
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

from krelay import control, trace
from krelay.control import MAX_LINE, BadRequest, Relay, Trace
from krelay.loop import Loop
from krelay.row import Rewrite
from krelay.unixsock import Peer, UnixListener
from krelay.worker import Worker

IDLE = 60.0
"""Seconds."""
MAX_CLIENTS = 64
CHUNK = 32 * 1024
"""Bytes of an answer made at a time."""
TRACE_BUFFER = 256 * 1024
"""Bytes of trace lines that wait for a slow reader."""


class ControlSocket:
    """Listens at `path` and answers for `relay`.  Raises OSError if it can't listen."""

    def __init__(self, loop: Loop, path: Path, relay: Relay, worker: Worker) -> None:
        self._loop = loop
        self._relay = relay
        self._worker = worker
        self._clients: set[_Client] = set()
        self._listener = UnixListener(loop, path, socket.SOCK_STREAM, self._accepted)

    def on_time(self, now: float) -> None:
        """Drops who has been silent for too long; call about once a second."""
        for client in list(self._clients):
            client.on_time(now)

    def close(self) -> None:
        """Drops everyone and removes the socket."""
        for client in list(self._clients):
            client.close()
        self._listener.close()

    def _accepted(self, connection: socket.socket, _: Peer) -> None:
        if len(self._clients) >= MAX_CLIENTS:
            connection.close()
            return
        self._clients.add(_Client(self._loop, connection, self._relay, self._left, self._tracing))

    def _left(self, client: "_Client") -> None:
        self._clients.discard(client)
        self._tracing()

    def _tracing(self) -> None:
        """Packets are looked at for traces only while somebody traces."""
        tracers = [client for client in self._clients if client.tracing]

        def tell(rewrite: Rewrite, packet: bytes, _: bytes) -> None:
            for client in tracers:
                client.saw(rewrite, packet)

        self._worker.on_rewrite = tell if tracers else None


class _Client:
    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        relay: Relay,
        left: "Callable[[_Client], object]",
        tracing_changed: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._socket = connection
        self._relay = relay
        self._left = left
        self._tracing_changed = tracing_changed
        self._in = b""
        self._out = bytearray()
        self._answer: Iterator[str] | None = None
        self._ended = False
        self._closed = False
        self._heard_at = loop.now
        self._lost = 0
        self.tracing: trace.Filter | None = None
        self._mask = select.EPOLLIN
        loop.add(connection.fileno(), self._mask, self._ready)

    def saw(self, rewrite: Rewrite, packet: bytes) -> None:
        """A packet is about to be rewritten."""
        if self.tracing is None or not self.tracing.admits(rewrite.row):
            return
        if len(self._out) > TRACE_BUFFER:
            self._lost += 1
            return
        if not self._out:
            self._heard_at = self._loop.now  # from now on something waits for it
            self._loop.call_soon(self._flush)
        if self._lost:
            self._out += f"lost {self._lost} lines: the reader is too slow\n".encode()
            self._lost = 0
        self._out += trace.line(rewrite, packet).encode() + b"\n"

    def on_time(self, now: float) -> None:
        waiting = bool(self._out) or self._answer is not None
        if now - self._heard_at >= IDLE and (waiting or self.tracing is None):
            self.close()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.tracing = None
        self._loop.remove(self._socket.fileno())
        self._socket.close()
        self._left(self)

    def _ready(self, events: int) -> None:
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and not self._ended:
            try:
                data = self._socket.recv(MAX_LINE)
            except BlockingIOError:
                pass
            except OSError:
                self.close()
                return
            else:
                if data:
                    self._heard_at = self._loop.now
                self._ended = not data
                if self.tracing is None:  # a tracing client has nothing more to ask
                    self._in += data
        elif events & (select.EPOLLHUP | select.EPOLLERR):
            self.close()
            return
        self._flush()

    def _flush(self) -> None:
        """Answers what was asked, as far as the client takes it."""
        while not self._closed:
            if self._out:
                try:
                    sent = self._socket.send(self._out)
                except BlockingIOError:
                    break
                except OSError:
                    self.close()
                    return
                del self._out[:sent]
                self._heard_at = self._loop.now
                continue
            if self._answer is not None:
                self._make_more()
                continue
            if not self._next_request():
                break
        self._wait()

    def _make_more(self) -> None:
        assert self._answer is not None
        made = []
        size = 0
        for line in self._answer:
            made.append(line)
            size += len(line)
            if size >= CHUNK:
                break
        else:
            self._answer = None
            made.append("")
        self._out += ("\n".join(made) + "\n").encode()

    def _next_request(self) -> bool:
        """Takes the next whole line; False if there is none yet."""
        line, newline, rest = self._in.partition(b"\n")
        if not newline and self._ended and self._in:
            newline = b"\n"  # the last line may lack its end
        if len(line) > MAX_LINE:  # whole or not
            self._in = b""
            self._ended = True
            self._out += f"error: a line has at most {MAX_LINE} bytes\n\n".encode()
            return True
        if not newline:
            if self._ended and self.tracing is None:
                self.close()
            return False
        self._in = rest
        try:
            found = control.answer(line.decode(errors="replace"), self._relay, self._loop.now)
        except BadRequest as error:
            self._out += f"error: {error}\n\n".encode()
            return True
        if isinstance(found, Trace):
            self.tracing = found.filter
            self._in = b""
            self._tracing_changed()
        else:
            self._answer = found
        return True

    def _wait(self) -> None:
        """Waits for what can go on: more to read, unless an answer is still under way."""
        if self._closed:
            return
        busy = bool(self._out) or self._answer is not None
        mask = (select.EPOLLOUT if busy else 0) | (
            0 if self._ended or (busy and self.tracing is None) else select.EPOLLIN
        )
        if mask != self._mask:
            self._mask = mask
            self._loop.modify(self._socket.fileno(), mask)
