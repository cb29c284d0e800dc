"""A client of a control socket: its requests, its answers, its trace.

It has a bounded buffer in either direction.  Lines of an answer are made only as fast as it takes
them; a tracing client that is too slow loses packets and is told how many.
"""

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from knet import descriptors
from knet.loop import Loop
from knet.unixsock import Crowd, Peer
from krelay.control import commands
from krelay.control.commands import MAX_LINE, BadRequest, RelayView, Trace
from krelay.control.turns import Turns
from krelay.datapath.worker import Worker
from krelay.nat.flow import Rewrite
from krelay.trace.capture import Capture
from krelay.trace.lines import REWRITE, WORDS, Lines, Recorder, Untouched

IDLE = 60.0
"""Seconds."""
CHUNK = 8 * 1024
"""Bytes of an answer made at a time: half a millisecond."""
TRACE_BUFFER = 256 * 1024
"""Bytes of trace lines that wait for a slow reader."""
CAPTURE_BUFFER = 4 << 20
"""The same for a capture, and as much again in the kernel: of each packet all bytes are shown,
twice, and some hundred packets come in a turn."""

# asm-generic/socket.h: beyond net.core.wmem_max, with CAP_NET_ADMIN.  The kernel doubles it.
_SO_SNDBUFFORCE = 32


class ControlClient:
    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        peer: Peer,
        relay: RelayView,
        worker: Worker,
        left: "Callable[[ControlClient], object]",
        trace_began: Callable[[], object],
        trace_ended: Callable[[], object],
        turns: Turns,
        tracers: Crowd,
        *,
        may_change: bool,
    ) -> None:
        self.peer = peer
        self.waits = False
        """Whether its turn is to come."""
        self._loop = loop
        self._socket = connection
        self._turns = turns
        self._tracers = tracers
        self._may_change = may_change
        self._relay = relay
        self._worker = worker
        self._left = left
        self._trace_began = trace_began
        self._trace_ended = trace_ended
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
        if trace is None or REWRITE not in trace.verdicts or not trace.filter.admits(rewrite.flow):
            return
        if self._has_room(rewrite):
            self._out += self._recorder.rewritten(rewrite, before, after, time.time_ns())

    def saw_untouched(self, what: Untouched) -> None:
        """A packet came, and was not rewritten."""
        trace = self.tracing
        if trace is None or WORDS[what.verdict] not in trace.verdicts:
            return
        if trace.filter.admits_unmatched(what.packet) and self._has_room(what):
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
        self._answer = None
        self._end_trace()
        try:
            self._loop.remove(self._socket.fileno())
            descriptors.hang_up(self._socket)
        finally:
            self._left(self)

    def step(self) -> None:
        """Its turn: a request is heard, if there is none to answer, and a piece of answer made."""
        if not self._closed and not self._out:  # else it is to read first
            if self._answer is None and self._has_request:
                self._next_request()
            if self._answer is not None:
                self._make_more()
        self._flush()

    def _ready(self, events: int) -> None:
        if events & (select.EPOLLIN | select.EPOLLHUP | select.EPOLLERR) and not self._ended:
            try:
                data = descriptors.read(self._socket, MAX_LINE)
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
        """Says what is to be said, as far as the client takes it."""
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
            elif self.tracing is not None and (said := self._recorder.caught_up()):
                self._out += said
            else:
                break
        if self._closed:
            return
        if not self._out:
            if self._answer is not None or self._has_request:
                self._turns.want(self)
            elif self._ended and self.tracing is None:
                self.close()
                return
        self._wait()

    @property
    def _has_request(self) -> bool:
        """Whether there is a whole line; the last may lack its end, and one may be too long."""
        return b"\n" in self._in or len(self._in) > MAX_LINE or (self._ended and bool(self._in))

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

    def _next_request(self) -> None:
        """Takes the next line."""
        line, _, rest = self._in.partition(b"\n")
        if len(line) > MAX_LINE:  # whole or not
            self._in = b""
            self._ended = True
            self._out += error_line(f"a line has at most {MAX_LINE} bytes")
            return
        self._in = rest
        try:
            found = commands.answer(
                line.decode(errors="replace"),
                self._relay,
                self._loop.now,
                may_change=self._may_change,
            )
        except BadRequest as error:
            self._out += error_line(str(error))
            return
        if not isinstance(found, Trace):
            self._answer = found
        elif self._tracers.enter(self.peer):
            self._begin_trace(found, " ".join(line.decode(errors="replace").split()))
        else:
            of_one = self._tracers.of_one
            self._out += error_line(
                f"there are too many traces; a user has at most {of_one}: end some"
            )

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
        self._trace_began()
        if self._ended:
            self._end_capture()

    def _end_capture(self) -> None:
        """A client that half-closes has had enough of a capture; lines go on, for `echo trace |
        socat`."""
        if self.tracing is not None and self.tracing.pcap:
            self._out += self._recorder.end(time.time_ns())
            self._end_trace()
            self._trace_ended()

    def _end_trace(self) -> None:
        if self.tracing is not None:
            self.tracing = None
            self._tracers.leave(self.peer)

    def _wait(self) -> None:
        """Waits for what can go on: more to read, unless an answer is still under way."""
        if self._closed:
            return
        busy = self.waits or bool(self._out) or self._answer is not None
        mask = (select.EPOLLOUT if self._out else 0) | (
            0 if self._ended or (busy and self.tracing is None) else select.EPOLLIN
        )
        if mask != self._mask:
            try:
                self._loop.modify(self._socket.fileno(), mask)
                self._mask = mask
            except OSError:
                self.close()


def error_line(text: str) -> bytes:
    """The answer to what can't be answered."""
    return f"error: {text}\n\n".encode()


def _is_own(worker: Worker, address: bytes) -> bool:
    return worker.policy is not None and address in worker.policy.own
