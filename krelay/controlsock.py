"""The control socket itself: lines in and out for clients, none of whom can hold us up.

A client has a bounded buffer in either direction.  Lines of an answer are made only as fast as the
client takes them; a tracing client that is too slow loses packets and is told how many.  Who says
nothing and has asked for nothing, or doesn't read, for IDLE seconds is dropped.
"""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from krelay import control
from krelay.control import MAX_LINE, BadRequest, Relay, Trace
from krelay.loop import Loop
from krelay.row import Rewrite
from krelay.trace import REWRITE, WORDS, Lines, Recorder, Untouched
from krelay.tracefile import Capture
from krelay.unixsock import Peer, UnixListener
from krelay.worker import Verdict, Worker

IDLE = 60.0
"""Seconds."""
MAX_CLIENTS = 64
CHUNK = 32 * 1024
"""Bytes of an answer made at a time."""
TRACE_BUFFER = 256 * 1024
"""Bytes of trace lines that wait for a slow reader."""
CAPTURE_BUFFER = 4 << 20
"""The same for a capture, and as much again in the kernel: of each packet all bytes are shown,
twice, and some hundred packets come in a turn."""

# asm-generic/socket.h: beyond net.core.wmem_max, with CAP_NET_ADMIN.  The kernel doubles it.
_SO_SNDBUFFORCE = 32


class ControlSocket:
    """Listens at `path` and answers for `relay`.  Raises OSError if it can't listen."""

    def __init__(self, loop: Loop, path: Path, relay: Relay, worker: Worker) -> None:
        self._loop = loop
        self._relay = relay
        self._worker = worker
        self._clients: set[_Client] = set()
        self._listener = UnixListener(loop, path, socket.SOCK_STREAM, self._accepted)

    @property
    def path(self) -> Path:
        """Where it listens."""
        return self._listener.path

    def renew(self) -> None:
        """Listens at its path again, if that leads elsewhere by now.  Raises OSError."""
        self._listener.renew()

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
        client = _Client(
            self._loop,
            connection,
            self._relay,
            self._worker,
            self._left,
            self._tracing_changed,
        )
        self._clients.add(client)

    def _left(self, client: "_Client") -> None:
        self._clients.discard(client)
        self._tracing_changed()

    def _tracing_changed(self) -> None:
        """Packets are looked at for traces only while somebody traces, and only those wanted."""
        tracers = [client for client in self._clients if client.tracing is not None]
        wanted = {
            verdict for client in tracers if client.tracing for verdict in client.tracing.verdicts
        }
        worker = self._worker

        def rewritten(rewrite: Rewrite, before: bytes, after: bytes) -> None:
            for client in tracers:
                client.saw_rewritten(rewrite, before, after)

        def untouched(packet: bytes, hook: int, verdict: Verdict, reason: str) -> None:
            if WORDS[verdict] not in wanted:
                return
            from_server = worker.policy is not None and packet[12:16] == worker.policy.server
            answers = tuple(worker.answers)
            what = Untouched(packet, hook, verdict, reason, answers, from_server)
            for client in tracers:
                client.saw_untouched(what)

        # Only what visits the worker can be shown; a row may come into the state that is wanted.
        self._relay.traced([t.filter.in_any_state for c in tracers if (t := c.tracing)])
        worker.on_rewrite = rewritten if REWRITE in wanted else None
        worker.on_untouched = untouched if wanted - {REWRITE} else None


class _Client:
    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        relay: Relay,
        worker: Worker,
        left: "Callable[[_Client], object]",
        tracing_changed: Callable[[], object],
    ) -> None:
        self._loop = loop
        self._socket = connection
        self._relay = relay
        self._worker = worker
        self._left = left
        self._tracing_changed = tracing_changed
        self._in = b""
        self._out = bytearray()
        self._answer: Iterator[str] | None = None
        self._ended = False
        self._closed = False
        self._heard_at = loop.now
        self.tracing: Trace | None = None
        self._recorder: Recorder = Lines()
        self._room = TRACE_BUFFER
        self._mask = select.EPOLLIN
        loop.add(connection.fileno(), self._mask, self._ready)

    def saw_rewritten(self, rewrite: Rewrite, before: bytes, after: bytes) -> None:
        """A packet came so, and goes on so."""
        trace = self.tracing
        if trace is None or REWRITE not in trace.verdicts or not trace.filter.admits(rewrite.row):
            return
        if self._has_room(rewrite):
            self._out += self._recorder.rewritten(rewrite, before, after, time.time_ns())

    def saw_untouched(self, what: Untouched) -> None:
        """A packet came, and was not rewritten."""
        trace = self.tracing
        if trace is None or WORDS[what.verdict] not in trace.verdicts:
            return
        if trace.filter.admits_stranger(what.packet) and self._has_room(what):
            self._out += self._recorder.untouched(what, time.time_ns())

    def _has_room(self, what: Rewrite | Untouched) -> bool:
        if len(self._out) > self._room:
            self._recorder.missed(what)
            self._worker.counts.trace_lost += 1
            return False
        if not self._out:
            self._heard_at = self._loop.now  # from now on something waits for it
            self._loop.call_soon(self._flush)
        return True

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
                elif self._ended:
                    self._end_capture()
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
            if self.tracing is not None and (said := self._recorder.caught_up()):
                self._out += said
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
            self._begin_trace(found, " ".join(line.decode(errors="replace").split()))
        else:
            self._answer = found
        return True

    def _begin_trace(self, asked: Trace, words: str) -> None:
        self.tracing = asked
        self._in = b""
        if asked.pcap:
            self._room = CAPTURE_BUFFER
            with suppress(OSError):  # the usual buffer will do; more is lost
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, CAPTURE_BUFFER // 2)
            host = os.uname()
            system = f"{host.sysname} {host.release}"
            self._recorder = Capture(
                time.time_ns(),
                hardware=host.machine,
                os=system,
                asked=words,
                is_own=partial(_is_own, self._worker),  # not our own method: a circle
            )
        self._out += self._recorder.begin()
        self._tracing_changed()
        if self._ended:
            self._end_capture()

    def _end_capture(self) -> None:
        """Who half-closes has had enough of a capture; lines go on, for `echo trace | socat`."""
        if self.tracing is not None and self.tracing.pcap:
            self._out += self._recorder.end(time.time_ns())
            self.tracing = None
            self._tracing_changed()

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


def _is_own(worker: Worker, address: bytes) -> bool:
    return worker.policy is not None and address in worker.policy.own
