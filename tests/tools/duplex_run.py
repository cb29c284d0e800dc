"""Plays scripts (duplex.py) on real connections, many at a time, beside the model.

Each run is a generator that yields where it waits: for the effect of a step to be seen at both
ends, or for a flood to have filled all buffers.  One thread takes them in turn, so there are no
threads whose order could matter, and a waiting run costs a few system calls a round.

The sockets have small buffers of fixed size, and segments as on Ethernet: with those of the
loopback (64 KiB) the kernel would give a relay's socket megabytes of buffer.  What is written are
random bytes, another part of them for each script and direction: a byte lost, doubled, exchanged or
meant for another connection is no prefix any more.
"""

import errno
import fcntl
import select
import socket
import struct
import termios
import time
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Protocol

from tests.tools.duplex import ENDS, FLOOD, Answer, Cut, Model, Step, Verb, View

SEND_BUFFER = 64 * 1024
RECEIVE_BUFFER = 16 * 1024
"""As given to setsockopt: the kernel takes twice as much.

The first send of a flood alone is more than a receiver takes, so an end of file or a reset that is
behind it can't be seen before it is read.
"""

SEGMENT = 1448
BOUNDED = 16 * 1024 * 1024
"""Bytes that no relay should take while nobody reads."""

PAUSE = 0.005  # seconds
LOOK = 0.001  # seconds
CALM = 3
"""So many looks in a row, LOOK apart, without a change: all buffers are full."""

_RESETTING = struct.pack("ii", 1, 0)
_EVENTS = ((select.POLLRDHUP, "RDHUP"), (select.POLLHUP, "HUP"), (select.POLLERR, "ERR"))
_STATES = {1: "ESTABLISHED", 4: "FIN-WAIT-1", 5: "FIN-WAIT-2", 7: "CLOSE", 8: "CLOSE-WAIT"}
"""Of tcpi_state; the others are too short-lived to have a name here."""
_STARTS = 1024 * 1024


@cache
def _bytes() -> bytes:
    """What is written."""
    return Random(0).randbytes(_STARTS + BOUNDED + FLOOD)


Waiting = Generator[None, None, None]
Ends = tuple[socket.socket, socket.socket]


class Dial(Protocol):
    """Makes a new connection: its client's socket and its server's."""

    def __call__(self) -> Ends: ...


class Way:
    """Connections to a listening socket of our own, on a way that leads there."""

    def __init__(self, bound: float) -> None:
        self._bound = bound
        self._listening = socket.socket()
        _set_buffers(self._listening)
        self._listening.bind(("127.0.0.1", 0))
        self._listening.listen()
        self._listening.settimeout(bound)
        self.port: int = self._listening.getsockname()[1]

    def close(self) -> None:
        self._listening.close()

    def dial(self, port: int) -> Ends:
        """Through `port`, one at a time: whoever is accepted is the peer."""
        client = socket.socket()
        try:
            _set_buffers(client)
            client.settimeout(self._bound)
            client.connect(("127.0.0.1", port))
            server, _ = self._listening.accept()
        except BaseException:
            client.close()
            raise
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return client, server


def _set_buffers(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, SEGMENT)


class End:
    """One program's socket, and how far it is in both streams."""

    def __init__(self, sock: socket.socket, out: memoryview, into: memoryview) -> None:
        self.sock: socket.socket | None = sock
        self.sent = 0
        self.received = 0
        self.flood = ""
        self._flood_end = 0
        self._out = out
        self._into = into
        self._poll = select.poll()
        self._poll.register(sock, select.POLLRDHUP)

    def close(self, abort: bool = False) -> None:
        if self.sock is None:
            return
        if abort:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESETTING)
        self.sock.close()
        self.sock = None

    def write(self, count: int, flags: int = 0) -> str:
        """One send; "ok" if all was taken."""
        assert self.sock
        try:
            taken = self.sock.send(self._out[self.sent : self.sent + count], flags)
        except OSError as error:
            return _name(error)
        self.sent += taken
        return "ok" if taken == count else f"{taken} of {count} taken"

    def begin_flood(self) -> str:
        """Its first send."""
        assert self.sock
        self._flood_end = self.sent + FLOOD
        try:
            self.sent += self.sock.send(self._out[self.sent : self._flood_end])
        except OSError as error:
            return _name(error)
        self.flood = "blocked"
        return "ok"

    def extend_flood(self) -> None:
        self._flood_end += FLOOD
        self.flood = "blocked"

    def go_on(self) -> None:
        """What can be sent of a blocked flood."""
        if self.flood != "blocked" or self.sock is None:
            return
        try:
            while self.sent < self._flood_end:
                self.sent += self.sock.send(self._out[self.sent : self._flood_end])
            self.flood = "done"
        except BlockingIOError:
            pass
        except OSError as error:
            self.flood = _name(error)

    def read(self, most: int) -> str:
        """One recv of up to that many bytes; "ok" if there were some."""
        assert self.sock
        try:
            data = self.sock.recv(most)
        except BlockingIOError:
            return "nothing"
        except OSError as error:
            return _name(error)
        if not data:
            return "EOF"
        expected = self._into[self.received : self.received + len(data)]
        if data != expected:
            good = next(i for i, (a, b) in enumerate(zip(data, expected, strict=True)) if a != b)
            return f"wrong bytes from {self.received + good} on"
        self.received += len(data)
        return "ok"

    def shutdown(self) -> str:
        assert self.sock
        if self.flood == "blocked":
            self.flood = ""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            return _name(error)
        return "ok"

    @property
    def unread(self) -> int:
        """Bytes in the kernel's queue."""
        return _count(self.sock, termios.FIONREAD)

    @property
    def unacked(self) -> int:
        return _count(self.sock, termios.TIOCOUTQ)

    def view(self) -> View | None:
        if self.sock is None:
            return None
        state = self.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        events = sum(mask for _, mask in self._poll.poll(0))
        flags = " ".join(name for mask, name in _EVENTS if events & mask)
        return View(self.unread, _STATES.get(state, str(state)), flags, self.flood)


def _count(sock: socket.socket | None, request: int) -> int:
    if sock is None:
        return 0
    (count,) = struct.unpack("i", fcntl.ioctl(sock, request, bytes(4)))
    return int(count)


def _name(error: OSError) -> str:
    return errno.errorcode.get(error.errno or 0, str(error))


Views = tuple[View | None, View | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One step: what the model expects, what was seen."""

    step: Step
    expected: Answer
    seen: Answer
    expected_views: Views
    seen_views: Views

    @property
    def is_as_expected(self) -> bool:
        """The answers agree, and so do the views in all that is predicted."""
        return (
            self.expected.result == self.seen.result
            and self.expected.least <= self.seen.least <= self.expected.most
            and _allow(self.expected_views, self.seen_views)
        )


def _allow(expected: Views, seen: Views) -> bool:
    return all(
        its is None if ours is None else its is not None and ours.allows(its)
        for ours, its in zip(expected, seen, strict=True)
    )


class Run:
    """A script on one connection.  `rows` ends with the first one that is not as expected."""

    def __init__(self, seed: int, script: Sequence[Step], dial: Dial, bound: float) -> None:
        self.seed = seed
        self.script = script
        self.model = Model()
        self.rows: list[Row] = []
        self.was_measured = False
        """The model was told numbers that it can't know, so they may differ on another way."""
        self.is_over = False
        """It was played, to its end or until it failed."""
        self._dial = dial
        self._bound = bound

    @property
    def failed(self) -> bool:
        return bool(self.rows) and not self.rows[-1].is_as_expected

    def play(self) -> Waiting:
        """To be resumed until it ends."""
        rng = Random(self.seed)
        streams = [memoryview(_bytes())[rng.randrange(_STARTS) :] for _ in ENDS]
        client, server = self._dial()
        ends = (End(client, streams[0], streams[1]), End(server, streams[1], streams[0]))
        try:
            for step in self.script:
                if self.model.can(step):
                    self.rows.append((yield from self._step(ends, step)))
                if self.failed:
                    break
            self.is_over = True
        finally:
            for end in ends:
                end.close(abort=True)

    def _step(self, ends: tuple[End, End], step: Step) -> Generator[None, None, Row]:
        me, peer = ends[step.end], ends[1 - step.end]
        cut = None
        if self.model.may_cut(step):
            self.was_measured = True
            cut = Cut(me.sent, me.sent - me.unacked, peer.received + peer.unread)
        was_full = self.model.streams[1 - step.end].full
        expected = self.model.play(step, cut)
        if step.verb is not Verb.READ:
            seen = Answer((yield from _call(me, step)))
        elif was_full:
            seen = yield from self._read_flood(ends, step, expected)
        else:
            seen = _read(me, step.count)
        if step.verb in (Verb.FLOOD, Verb.READ) and any(s.full for s in self.model.streams):
            yield from self._filled(ends)
        expected_views = (self.model.view(0), self.model.view(1))
        seen_views = yield from self._settled(ends, expected_views)
        return Row(step, expected, seen, expected_views, seen_views)

    def _read_flood(
        self, ends: tuple[End, End], step: Step, expected: Answer
    ) -> Generator[None, None, Answer]:
        """As many bytes as are to come, and what is behind them."""
        me = ends[step.end]
        deadline = time.monotonic() + self._bound
        got, result = 0, "nothing"
        while time.monotonic() < deadline:
            self._go_on(ends)
            _, count, _ = answer = _read(me, None if step.count is None else step.count - got)
            got, result = got + count, answer.result
            if result != "nothing" or (expected.result == "nothing" and got >= expected.least):
                break
            yield
        if expected.result == "RST":
            result = yield from self._torn(me, result, deadline)
        return Answer(result, got, got)

    def _go_on(self, ends: tuple[End, End]) -> None:
        """Whatever can be sent of floods."""
        for number, end in enumerate(ends):
            end.go_on()
            is_short = end.flood == "done" and self.model.sockets[number].flood != "done"
            if is_short and end.sent < BOUNDED:
                self.model.extend(number)
                end.extend_flood()
                self.was_measured = True

    def _torn(self, me: End, result: str, deadline: float) -> Generator[None, None, str]:
        """Whether a read that gave `result` or the blocked write has reported the reset."""
        while me.flood == "blocked" and time.monotonic() < deadline:
            me.go_on()
            yield
        calls = (result, me.flood)
        if calls not in (("EOF", "ECONNRESET"), ("ECONNRESET", "EPIPE")):
            return f"{result}, flood {me.flood}"
        me.flood = "RST"
        return "RST"

    def _filled(self, ends: tuple[End, End]) -> Waiting:
        """Until nothing moves."""
        deadline = time.monotonic() + self._bound
        calm, before, looked = 0, None, 0.0
        while calm < CALM and (now := time.monotonic()) < deadline:
            self._go_on(ends)
            if now >= looked + LOOK:
                amounts = [(end.sent, end.unacked, end.unread) for end in ends]
                calm = calm + 1 if amounts == before else 0
                before, looked = amounts, now
            yield

    def _settled(self, ends: tuple[End, End], expected: Views) -> Generator[None, None, Views]:
        """Until both ends see what they should; what they see."""
        deadline = time.monotonic() + self._bound
        while True:
            self._go_on(ends)
            seen = (ends[0].view(), ends[1].view())
            if _allow(expected, seen) or time.monotonic() >= deadline:
                return seen
            yield


def _call(end: End, step: Step) -> Generator[None, None, str]:
    """Any but a read."""
    match step.verb:
        case Verb.WRITE:
            return end.write(step.count or 0)
        case Verb.URGENT:
            return end.write(1, socket.MSG_OOB)
        case Verb.FLOOD:
            return end.begin_flood()
        case Verb.SHUTDOWN:
            return end.shutdown()
        case Verb.PAUSE:
            over = time.monotonic() + PAUSE
            while time.monotonic() < over:
                yield
        case Verb.CLOSE | Verb.ABORT:
            end.close(abort=step.verb is Verb.ABORT)
    return "ok"


def _read(end: End, count: int | None) -> Answer:
    """Until there are that many bytes, or no more (None)."""
    start = end.received
    while count is None or end.received - start < count:
        most = 65536 if count is None else count - (end.received - start)
        result = end.read(most)
        if result != "ok":
            break
    else:
        result = "ok"
    return Answer(result, end.received - start, end.received - start)


def play(runs: Iterable[Run], width: int = 48, failures: int = 3) -> list[Run]:
    """Plays them, up to `width` at a time, until so many have failed; those that were played."""
    waiting = iter(runs)
    played: list[Run] = []
    active: list[tuple[Run, Waiting]] = []
    try:
        while True:
            while len(active) < width and (run := next(waiting, None)):
                active.append((run, run.play()))
            if not active or sum(run.failed for run in played) >= failures:
                return played
            still = []
            for run, playing in active:
                try:
                    next(playing)
                    still.append((run, playing))
                except StopIteration:
                    played.append(run)
            active = still
            time.sleep(0.0001)  # the relay's turn
    finally:
        for _, playing in active:
            playing.close()
