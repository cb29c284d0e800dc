"""Connections at a steady rate, one after the other and thousands in all; none may go wrong.

    churn.py serve ADDRESS PORT
    churn.py drive HOST PORT RATE SECONDS WHO-ENDS

Each connection sends a word that no other has, and wants it back together with an own address: the
server answers with the word and whom it sees.  Then it is ended: by the `client` first, by the
`server` first, by `both` at once, or by a `reset` of the client's.  Whatever goes wrong is counted
by kind; `drive` prints the counts as JSON in the end.

One process, one epoll each.
"""

import errno
import json
import os
import select
import socket
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass

CLIENT, SERVER, BOTH, RESET = WAYS = ("client", "server", "both", "reset")
PATIENCE = 20.0
"""Seconds until a connection counts as hung."""
MOST_OPEN = 4000
BURST = 50
"""Connections begun at once, at most, after a delay."""

_RESETTING = struct.pack("ii", 1, 0)  # struct linger: on, for 0 seconds


def serve(address: str, port: int) -> None:
    """Serves until it is killed."""
    peers: dict[int, tuple[socket.socket, bytes]] = {}
    with socket.create_server((address, port), backlog=4096) as listener, select.epoll() as poll:
        listener.setblocking(False)
        poll.register(listener, select.EPOLLIN)
        while True:
            for number, _ in poll.poll():
                if number == listener.fileno():
                    _accept(listener, poll, peers)
                elif not _answer(*peers[number]):
                    peers.pop(number)[0].close()


def _accept(
    listener: socket.socket, poll: select.epoll, peers: dict[int, tuple[socket.socket, bytes]]
) -> None:
    for _ in range(BURST):
        try:
            peer, (host, port) = listener.accept()
        except BlockingIOError:
            return
        except OSError:  # it is gone already
            continue
        peers[peer.fileno()] = peer, f" {host} {port}\n".encode()
        poll.register(peer, select.EPOLLIN)


def _answer(peer: socket.socket, name: bytes) -> bool:
    """Whether the connection goes on.  So short a word comes in one piece."""
    try:
        word = peer.recv(100).rstrip()
        if word:
            peer.sendall(word + name)
    except OSError:
        return False
    return word.startswith((CLIENT.encode(), RESET.encode()))


@dataclass(slots=True)
class Talk:
    """One connection of the client's."""

    sock: socket.socket
    word: bytes
    began: float
    is_connected: bool = False
    answer: bytes = b""


class Drive:
    """Talks to the server of which `destination` is an address or a relay's."""

    def __init__(self, destination: tuple[str, int], way: str) -> None:
        self.errors: Counter[str] = Counter()
        self.took: list[float] = []
        self.began = 0
        self._destination = destination
        self._way = way
        self._stamp = os.urandom(4).hex()
        self._talks: dict[int, Talk] = {}  # in the order they began
        self._poll = select.epoll()

    def run(self, rate: float, seconds: float) -> float:
        """Returns after how many seconds all have ended."""
        start, wanted = time.monotonic(), int(rate * seconds)
        while self.began < wanted or self._talks:
            now = time.monotonic()
            due = min(wanted, int((now - start) * rate) + 1, self.began + BURST)
            while self.began < due and len(self._talks) < MOST_OPEN:
                self._begin(now)
            for number, _ in self._poll.poll(0.5 / rate if self.began < wanted else 0.1):
                self._step(number)
            self._give_up(now)
        self._poll.close()
        return time.monotonic() - start

    def _begin(self, now: float) -> None:
        self.began += 1
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        error = sock.connect_ex(self._destination)
        if error not in (0, errno.EINPROGRESS):
            # EADDRNOTAVAIL is the client's own: it has no port left
            self.errors[f"connect: {errno.errorcode[error]}"] += 1
            sock.close()
            return
        word = f"{self._way} {self._stamp} {self.began}".encode()
        self._talks[sock.fileno()] = Talk(sock, word, now)
        self._poll.register(sock, select.EPOLLOUT)

    def _step(self, number: int) -> None:
        talk = self._talks[number]
        try:
            if not talk.is_connected:
                if error := talk.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                    raise OSError(error, "connect")
                talk.is_connected = True
                talk.sock.sendall(talk.word + b"\n")
                self._poll.modify(talk.sock, select.EPOLLIN)
                return
            data = talk.sock.recv(200)
        except OSError as error:
            stage = "answered" if talk.answer else "open" if talk.is_connected else "connect"
            self._end(number, f"{stage}: {errno.errorcode[error.errno or 0]}")
            return
        if talk.answer.endswith(b"\n"):  # so this is the server's end
            self._end(number, "bytes behind the answer" if data else None)
            return
        talk.answer += data
        if not data:
            self._end(number, "end of file before the answer")
        elif talk.answer.endswith(b"\n"):
            self._answered(number, talk)

    def _answered(self, number: int, talk: Talk) -> None:
        word, host, _ = talk.answer.rsplit(maxsplit=2)
        if word != talk.word:
            self._end(number, "another's answer")
        elif host.decode() != talk.sock.getsockname()[0]:
            self._end(number, "another's address")
        elif self._way != SERVER:
            if self._way == RESET:
                talk.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESETTING)
            self._end(number)

    def _give_up(self, now: float) -> None:
        while self._talks:
            number, talk = next(iter(self._talks.items()))
            if now - talk.began < PATIENCE:
                return
            self._end(number, f"hung, {'answered' if talk.answer else 'unanswered'}")

    def _end(self, number: int, error: str | None = None) -> None:
        talk = self._talks.pop(number)
        talk.sock.close()
        if error is not None:
            self.errors[error] += 1
        else:
            self.took.append(time.monotonic() - talk.began)


def drive(host: str, port: int, rate: float, seconds: float, way: str) -> None:
    """Prints what was begun and done, how fast, and the errors; times in seconds."""
    run = Drive((host, port), way)
    lasted = run.run(rate, seconds)
    took = sorted(run.took) or [0.0]
    figures = {
        "begun": run.began,
        "done": len(run.took),
        "rate": round(len(run.took) / lasted, 1),
        "p50": round(took[len(took) // 2], 4),
        "p99": round(took[len(took) * 99 // 100], 4),
        "errors": dict(run.errors),
    }
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    command, host, port, *rest = sys.argv[1:]
    if command == "serve":
        serve(host, int(port))
    else:
        drive(host, int(port), float(rest[0]), float(rest[1]), rest[2])
