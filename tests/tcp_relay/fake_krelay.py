"""A krelay that only talks: it keeps what it is told, and answers what the test wants."""

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from knet.endpoint import Endpoint, Source
from krelay.registration.messages import (
    MAX_MESSAGE,
    Answer,
    Close,
    Listening,
    NotListening,
    Open,
    Opened,
    Refused,
    Report,
    Request,
    Resume,
    Resumed,
    emit,
    parse_request,
)

Reply = Answer | bytes | None


class FakeKrelay:
    """Listens on `root`/relay.sock; `reply` makes the answer to each request, None for none."""

    def __init__(self, root: Path, server: Endpoint) -> None:
        self.requests: list[Request] = []
        self.reports: list[Report] = []
        """Told once a second, between the requests: kept apart from them."""
        self.gports: list[Listening | NotListening] = []
        self.reply: Callable[[Request], Reply] = lambda request: opened_to(server, request)
        self._path = root / "relay.sock"
        self._listening: socket.socket | None = None
        self._peer: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Listens (again)."""
        self._path.unlink(missing_ok=True)
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listening.bind(str(self._path))
        self._listening.listen()
        self._thread = threading.Thread(target=self._serve, args=(self._listening,))
        self._thread.start()

    def stop(self) -> None:
        """Hangs up, and is away from then on."""
        if self._listening is None or self._thread is None:
            return
        self._path.unlink(missing_ok=True)
        listening, self._listening = self._listening, None
        listening.shutdown(socket.SHUT_RDWR)
        give_up = time.monotonic() + 30
        while self._thread.is_alive():
            assert time.monotonic() < give_up
            self.hang_up()  # again: it may just be accepting
            self._thread.join(0.05)
        listening.close()

    def hang_up(self) -> None:
        """Ends the connection and takes the next."""
        if (peer := self._peer) is not None:
            with suppress(OSError):  # it has just hung up by itself
                peer.shutdown(socket.SHUT_RDWR)

    def say(self, reply: Answer | bytes) -> None:
        """Speaks without being asked."""
        assert self._peer is not None
        self._peer.send(reply if isinstance(reply, bytes) else emit(reply))

    def got(self, kind: type[Request]) -> list[Request]:
        """The requests of one kind, so far."""
        return [request for request in self.requests if isinstance(request, kind)]

    def opens(self) -> list[Open]:
        """The opens so far."""
        return [request for request in self.requests if isinstance(request, Open)]

    def resumes(self) -> list[Resume]:
        """The resumes so far."""
        return [request for request in self.requests if isinstance(request, Resume)]

    def closes(self) -> list[Endpoint]:
        """The relay ports that were closed."""
        return [request.relay for request in self.requests if isinstance(request, Close)]

    def _serve(self, listening: socket.socket) -> None:
        while True:
            try:
                peer, _ = listening.accept()
            except OSError:
                return
            with peer:
                self._peer = peer
                self._talk(peer)
                self._peer = None

    def _talk(self, peer: socket.socket) -> None:
        while True:
            try:
                packet = peer.recv(MAX_MESSAGE)
                if not packet:
                    return
                request = parse_request(packet)
                if isinstance(request, Report):
                    self.reports.append(request)
                    continue
                if isinstance(request, Listening | NotListening):
                    self.gports.append(request)
                    continue
                self.requests.append(request)
                if (reply := self.reply(request)) is not None:
                    self.say(reply)
            except OSError:
                return


def opened_to(server: Endpoint, request: Request) -> Reply:
    """What a krelay says to whom all is well."""
    match request:
        case Open(id=number):
            return Opened(number, server, Source.CLIENT)
        case Resume(id=number):
            return Resumed(number)
        case Close() | Report() | Listening() | NotListening():
            return None


def refusing(
    error: str, times: int, then: Callable[[Request], Reply]
) -> Callable[[Request], Reply]:
    """Refuses the first `times` opens."""
    left = [times]

    def reply(request: Request) -> Reply:
        if isinstance(request, Open) and left[0]:
            left[0] -= 1
            return Refused(request.id, error)
        return then(request)

    return reply
