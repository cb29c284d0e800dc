"""The control sockets themselves: lines in and out for clients, none of whom can hold us up.

There are two, of one language: control.sock with all of it, and view.sock for who may only look.

A client has a bounded buffer in either direction.  Lines of an answer are made only as fast as the
client takes them; a tracing client that is too slow loses packets and is told how many.  Who says
nothing and has asked for nothing, or doesn't read, for IDLE seconds is dropped.

However many ask, and however fast they read: in a turn of the loop one request is heard, or one
piece of an answer made, and as long as packets come that takes a quarter of the time (_Turns).
Root's come first.
"""

import os
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from knet import descriptors
from knet.loop import Loop, Timer
from knet.roles import ADMIN, VIEW, Role
from knet.unixsock import Crowd, Peer, UnixListener
from krelay.control import language
from krelay.control.language import MAX_LINE, BadRequest, RelayView, Trace
from krelay.datapath.worker import Verdict, Worker
from krelay.nat.flow import Rewrite
from krelay.trace.capture import Capture
from krelay.trace.lines import REWRITE, WORDS, Lines, Recorder, Untouched

IDLE = 60.0
"""Seconds."""
MAX_CLIENTS, MAX_OF_ONE = 64, 16
"""Of each socket, in all and of one user who isn't root (unixsock.Crowd)."""
MAX_TRACERS, MAX_TRACERS_OF_ONE = 32, 4
"""The same for those that trace, of both sockets together: each costs something per packet."""
CHUNK = 8 * 1024
"""Bytes of an answer made at a time: half a millisecond."""
END_AFTER = 0.1
"""Seconds after the end of a trace until the kernel may be handed its flows again."""
BUSY = 0.0001
"""Seconds between two pieces of answers, made in two turns that follow each other, that tell of
other work: two system calls take a tenth of it."""
SHARE = 3
"""Times as long as a piece of an answer took, others have their turn before the next."""
LONGEST, LONGEST_OF_ROOT = 0.1, 0.02
"""Seconds at most that a piece of an answer waits so, and one of root's."""
TRACE_BUFFER = 256 * 1024
"""Bytes of trace lines that wait for a slow reader."""
CAPTURE_BUFFER = 4 << 20
"""The same for a capture, and as much again in the kernel: of each packet all bytes are shown,
twice, and some hundred packets come in a turn."""

# asm-generic/socket.h: beyond net.core.wmem_max, with CAP_NET_ADMIN.  The kernel doubles it.
_SO_SNDBUFFORCE = 32


class ControlSocket:
    """Listens at `root` for both roles, and answers for `relay`.  Raises OSError if it can't."""

    def __init__(self, loop: Loop, root: Path, relay: RelayView, worker: Worker) -> None:
        self._loop = loop
        self._relay = relay
        self._worker = worker
        self._clients: set[_Client] = set()
        self._tracers = Crowd(MAX_TRACERS, MAX_TRACERS_OF_ONE)
        self._turns = _Turns(loop)
        self._ending: Timer | None = None
        self.listeners: list[UnixListener] = []
        """One for each role."""
        try:
            for role in (ADMIN, VIEW):
                self.listeners.append(self._listening(root, role))
        except OSError:
            self.close()
            raise

    @property
    def traces(self) -> int:
        """How many traces are in force."""
        return sum(client.tracing is not None for client in self._clients)

    def on_time(self, now: float) -> None:
        """Drops who has been silent for too long; call about once a second."""
        for client in list(self._clients):
            client.on_time(now)

    def close(self) -> None:
        """Drops everyone and removes the sockets."""
        for client in list(self._clients):
            client.close()
        for listener in self.listeners:
            listener.close()

    def _listening(self, root: Path, role: Role) -> UnixListener:
        crowd = Crowd(MAX_CLIENTS, MAX_OF_ONE)

        def accepted(connection: socket.socket, peer: Peer) -> None:
            def left(client: _Client) -> None:
                crowd.leave(peer)
                self._clients.discard(client)
                self._trace_ended()

            client = _Client(
                self._loop,
                connection,
                peer,
                self._relay,
                self._worker,
                left,
                self._trace_began,
                self._trace_ended,
                self._turns,
                self._tracers,
                may_change=role is ADMIN,
            )
            self._clients.add(client)

        return UnixListener(self._loop, root, role, socket.SOCK_STREAM, accepted, _error, crowd)

    def _trace_began(self) -> None:
        self._tell_relay()
        self._look()

    def _trace_ended(self) -> None:
        """What was taken back from the kernel for it may go there again by and by.

        That can take a change of rules, and somebody may begin and end traces without pause.
        """
        self._look()
        if self._ending is None or not self._ending.pending:
            self._ending = self._loop.call_at(self._loop.now + END_AFTER, self._tell_relay)

    def _tell_relay(self) -> None:
        """Only what visits the worker can be shown; a flow may come into the wanted state yet."""
        filters = [each.tracing.filter for each in self._clients if each.tracing is not None]
        self._relay.traced([each.in_any_state for each in filters])

    def _look(self) -> None:
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
            from_server = worker.policy is not None and packet[12:16] in worker.policy.backends
            answers = tuple(worker.answers)
            what = Untouched(packet, hook, verdict, reason, answers, from_server)
            for client in tracers:
                client.saw_untouched(what)

        worker.on_rewrite = rewritten if REWRITE in wanted else None
        worker.on_untouched = untouched if wanted - {REWRITE} else None


class _Turns:
    """Who is next to have a request heard, or a piece of an answer made: one in a turn of the loop.

    Root's clients first, and those of others one after the other.  A turn that took longer than
    nothing had other work: then the next piece waits until that has had its share.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._roots: deque[_Client] = deque()
        self._others: deque[_Client] = deque()
        self._is_going = False
        self._waiting: Timer | None = None
        self._took = 0.0
        self._ended_at = 0.0

    def want(self, client: "_Client") -> None:
        """It has something to do; it is told to `step` once."""
        if client.waits:
            return
        client.waits = True
        (self._roots if client.peer.is_root else self._others).append(client)
        if not self._is_going:
            self._is_going = True
            self._step()  # a trace is to show what comes right behind its request
        elif client.peer.is_root and self._waiting is not None and self._waiting.pending:
            self._waiting.cancel()  # that was for others
            self._loop.call_soon(self._step)

    def _next(self) -> None:
        if not (self._roots or self._others):
            self._is_going = False
        elif time.monotonic() - self._ended_at > BUSY:
            wait = min(SHARE * self._took, LONGEST_OF_ROOT if self._roots else LONGEST)
            self._waiting = self._loop.call_at(self._loop.now + wait, self._step)
        else:
            self._step()

    def _step(self) -> None:
        began = time.monotonic()
        client = (self._roots or self._others).popleft()
        client.waits = False
        try:
            client.step()
        finally:
            self._ended_at = time.monotonic()
            self._took = self._ended_at - began
            self._loop.call_soon(self._next)


class _Client:
    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        peer: Peer,
        relay: RelayView,
        worker: Worker,
        left: "Callable[[_Client], object]",
        trace_began: Callable[[], object],
        trace_ended: Callable[[], object],
        turns: _Turns,
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
            self._out += _error(f"a line has at most {MAX_LINE} bytes")
            return
        self._in = rest
        try:
            found = language.answer(
                line.decode(errors="replace"),
                self._relay,
                self._loop.now,
                may_change=self._may_change,
            )
        except BadRequest as error:
            self._out += _error(str(error))
            return
        if not isinstance(found, Trace):
            self._answer = found
        elif self._tracers.enter(self.peer):
            self._begin_trace(found, " ".join(line.decode(errors="replace").split()))
        else:
            of_one = self._tracers.of_one
            self._out += _error(f"there are too many traces; a user has at most {of_one}: end some")

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
        """Who half-closes has had enough of a capture; lines go on, for `echo trace | socat`."""
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


def _error(text: str) -> bytes:
    return f"error: {text}\n\n".encode()


def _is_own(worker: Worker, address: bytes) -> bool:
    return worker.policy is not None and address in worker.policy.own
