"""One end of a connection through the proxy, as scripts use it.

How TCP tells an end: a FIN reads as b"", a RST as ECONNRESET, and a RST behind a FIN as EPIPE
(tcp_reset in the kernel looks at the state).  The error is told once, to whichever call comes
first; so every method here takes it as its result and asks nobody again.  What arrived before a RST
can still be read, and comes first; an end that mustn't read learns of it by poll(2).

What is sent is the text of a seed, so that any byte lost, doubled or swapped is seen, and where.
"""

import errno
import math
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from enum import Enum

from tests.net.programs.server import blob

PIECE = 1 << 16
BOUND = 48 << 20
"""Bytes that may be under way between an end that sends and one that doesn't read.

What the proxy holds, and the kernel's buffers: the largest is that of a fast reader, up to 32 MB
(net.ipv4.tcp_rmem), which the proxy is until it stops.
"""
_RESET = struct.pack("ii", 1, 0)


class Failure(Exception):
    """The proxy is at fault; the text says how it showed."""


class Ending(Enum):
    """How a peer sees a connection end."""

    FIN = "an end of file"
    RST = "a reset"


class Text:
    """Compares what comes with the text of a seed."""

    def __init__(self, seed: int, size: int) -> None:
        self._blocks = blob(seed, size)
        self._due = memoryview(b"")
        self.got = 0

    def feed(self, data: bytes) -> str | None:
        """What is wrong with the next bytes, if anything."""
        rest = memoryview(data)
        while rest:
            if not self._due:
                self._due = memoryview(next(self._blocks, b""))
                if not self._due:
                    return f"more than the {self.got:,} bytes that were sent"
            count = min(len(rest), len(self._due))
            if rest[:count] != self._due[:count]:
                wrong = next(i for i in range(count) if rest[i] != self._due[i])
                return f"byte {self.got + wrong:,} is not what was sent"
            self.got += count
            rest, self._due = rest[count:], self._due[count:]
        return None


class End:
    """A socket, and until when it may take its time.  Every method raises Failure."""

    def __init__(self, sock: socket.socket, who: str, patience: float, deadline: float) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.who = who
        self.sent = 0
        self._patience = patience
        self._deadline = deadline

    # Patience

    def give(self, seconds: float) -> None:
        """From now on this end waits that long."""
        self._patience, self._deadline = seconds, time.monotonic() + seconds

    def _wait(self, events: int, what: str) -> None:
        if not self._ready(events, self._deadline - time.monotonic()):
            raise Failure(f"{self.who}: {what} within {self._patience:g} s")

    def _ready(self, events: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self.sock, events)
        return bool(poll.poll(max(0.0, seconds) * 1000))

    # Sending

    def send(self, data: bytes) -> None:
        """All of it."""
        self._send_all(iter([data]), len(data))

    def send_text(self, seed: int, size: int) -> None:
        """That many bytes of the seed's text."""
        self._send_all(blob(seed, size), size)

    def _send_all(self, blocks: Iterator[bytes], size: int) -> None:
        done = 0
        for block in blocks:
            rest = memoryview(block)
            while rest:
                try:
                    count = self.sock.send(rest)
                except BlockingIOError:
                    self._wait(select.POLLOUT, f"{done:,} of {size:,} bytes were taken")
                except OSError as error:
                    raise self._broken(error, f"{done:,} of {size:,} bytes were taken") from None
                else:
                    self.sent += count
                    done += count
                    rest = rest[count:]

    def flood(
        self,
        seed: int,
        *,
        still: float = math.inf,
        stop: threading.Event | None = None,
        read: Callable[[], int] = lambda: 0,
    ) -> Ending | None:
        """Sends until nothing was taken for `still` seconds, or until told to `stop`.

        How the connection ended if it did before.  It is a failure if more than BOUND bytes were
        sent beyond those that the other end says it has `read`.
        """
        rest, moved_at = memoryview(b""), time.monotonic()
        text = blob(seed, 1 << 40)
        while not (stop and stop.is_set()):
            rest = rest or memoryview(next(text))
            try:
                count = self.sock.send(rest)
            except BlockingIOError:
                now = time.monotonic()
                if now >= moved_at + still:
                    return None
                if now >= self._deadline:
                    raise Failure(
                        f"{self.who}: nothing was taken for {now - moved_at:.1f} s, after "
                        f"{self.sent:,} bytes, and the connection still stands"
                    ) from None
                self._ready(select.POLLOUT, min(0.1, moved_at + still - now))
            except OSError as error:
                return Ending.RST if error.errno == errno.ECONNRESET else Ending.FIN
            else:
                moved_at = time.monotonic()
                self.sent += count
                rest = rest[count:]
                if (held := self.sent - read()) > BOUND:
                    raise Failure(
                        f"{self.who}: {held:,} bytes were taken that the other end has not read "
                        f"(at most {BOUND:,} is right)"
                    )
        return None

    def shut(self) -> None:
        """Sends a FIN, and goes on receiving."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError as error:
            raise self._broken(error, "it was to be shut") from None

    def close(self) -> None:
        """Sends a FIN, or a RST if something received was not read."""
        self.sock.close()

    def reset(self) -> None:
        """Sends a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.sock.close()

    # Receiving

    def receive(self, size: int) -> bytes:
        """Just that many bytes."""
        got = b""
        while len(got) < size:
            so_far = f"{len(got):,} of {size:,} bytes came"
            data = self._receive(size - len(got), so_far)
            if not data:
                raise Failure(f"{self.who}: end of file when {so_far}")
            got += data
        return got

    def receive_text(self, seed: int, size: int) -> None:
        """That many bytes of the seed's text, and then the end of file."""
        text = Text(seed, size)
        while data := self._receive(PIECE, f"{text.got:,} of {size:,} bytes came"):
            self._check(text, data)
        if text.got < size:
            raise Failure(f"{self.who}: end of file when {text.got:,} of {size:,} bytes came")

    def receive_slowly(self, text: Text, rate: float, seconds: float) -> None:
        """Reads at most `rate` bytes a second, for that long."""
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < seconds:
            room = int(rate * elapsed) - text.got
            if room < PIECE // 8:
                time.sleep(min(0.1, (PIECE // 8 - room) / rate))
                continue
            so_far = f"{text.got:,} bytes came, slowly read for {elapsed:.1f} s"
            data = self._receive(min(room, PIECE), so_far)
            if not data:
                raise Failure(f"{self.who}: end of file when {so_far}")
            self._check(text, data)

    def receive_rest(self, text: Text) -> Ending:
        """Reads on, to the end."""
        try:
            while data := self._receive(PIECE, f"no end came after {text.got:,} bytes"):
                self._check(text, data)
        except _Broken as error:
            if error.number != errno.ECONNRESET:
                raise
            return Ending.RST
        return Ending.FIN

    def receive_nothing(self, seconds: float) -> None:
        """Neither bytes nor an end, for that long."""
        began = time.monotonic()
        if self._ready(select.POLLIN, seconds):
            so_far = f"nothing had been sent for {time.monotonic() - began:.1f} s"
            data = self._receive(1, so_far)
            raise Failure(f"{self.who}: {'bytes' if data else 'end of file'} when {so_far}")

    def over(self) -> Ending:
        """Waits for the end of the connection, and reads nothing."""
        self._wait(select.POLLRDHUP, "the connection, of which nothing is read, did not end")
        number = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return Ending.RST if number == errno.ECONNRESET else Ending.FIN

    def echo(self) -> None:
        """Sends back what comes, and the end of file."""
        while data := self._receive(PIECE, "nothing more came"):
            self.send(data)
        self.shut()

    def _receive(self, size: int, so_far: str) -> bytes:
        while True:
            try:
                return self.sock.recv(size)
            except BlockingIOError:
                self._wait(select.POLLIN, so_far)
            except OSError as error:
                raise self._broken(error, so_far) from None

    def _check(self, text: Text, data: bytes) -> None:
        if fault := text.feed(data):
            raise Failure(f"{self.who}: {fault}")

    def _broken(self, error: OSError, so_far: str) -> "_Broken":
        broken = _Broken(f"{self.who}: {(error.strerror or str(error)).lower()} when {so_far}")
        broken.number = error.errno
        return broken


class _Broken(Failure):
    """An error of the socket, where the script wanted none."""

    number: int | None = None


def must(end: End, seen: Ending | None, due: Ending) -> None:
    """Fails unless this end saw what was due."""
    if seen is not due:
        found = seen.value if seen else "nothing"
        raise Failure(f"{end.who}: saw {found} where {due.value} was due")
