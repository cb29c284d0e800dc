"""The relay socket itself: SEQPACKET, one message a packet, any number of tcp-relays.

A malformed message gets an error and ends that connection.  A tcp-relay that doesn't read its
answers is disconnected once its buffer is full: it will reconnect and resume.

Descriptors may come with any message (descriptors.py); but for `listening`, a message with one is
malformed.  Where a connection is lost, what still lies in it unread may hold some, too, and so it
is closed apart.
"""

import select
import socket
from pathlib import Path
from typing import TypeAlias

from knet import descriptors
from knet.log import Failures, Log, Throttle
from knet.loop import HOST_FAILS, Loop
from knet.ratelimit import RateLimiter
from knet.roles import RELAY
from knet.unixsock import Crowd, Peer, UnixListener, last_descriptor
from krelay.registration.gatewayports import GatewayPorts
from krelay.registration.messages import (
    MAX_MESSAGE,
    Answer,
    BadMessage,
    Listening,
    NotListening,
    Refused,
    Request,
    emit,
    parse_request,
)
from krelay.registration.registry import Relays

MAX_PER_TURN = 64
MAX_LINKS, MAX_OF_ONE = 256, 128
"""Connections in all, and of one user who isn't root (unixsock.Crowd); a worker of tcp-relay has
one."""
SEND_BUFFER = 4 << 20
TOLD, TOLD_AT_ONCE = 1, 100
"""Connections a second that are told in the log, and so many at once."""

_Came: TypeAlias = tuple[Request | str, list[int]]
"""A message, or what is wrong with it, and the descriptors that came with it."""

_log = Log("relays")
_malformed, _not_listening = Throttle(), Throttle()


class RelaySocket:
    """Listens at `root` and answers tcp-relays from `relays`, those of `group` if that is given.

    `gateways` gets their listening sockets.  Raises OSError if it can't listen.
    """

    def __init__(
        self,
        loop: Loop,
        root: Path,
        relays: Relays,
        gateways: GatewayPorts,
        group: int | None = None,
    ) -> None:
        self._loop = loop
        self._relays = relays
        self._gateways = gateways
        self._links: set[_Connection] = set()
        self._crowd = Crowd(MAX_LINKS, MAX_OF_ONE)
        self._told = RateLimiter(TOLD, TOLD_AT_ONCE)
        self._untold = 0
        """Connections that came without a line in the log, since the last that had one."""
        self._listener = UnixListener(
            loop, root, RELAY, socket.SOCK_SEQPACKET, self._accepted, _worded, self._crowd, group
        )

    @property
    def path(self) -> Path:
        """Where it listens."""
        return self._listener.path

    def renew(self) -> None:
        """Listens at its path again, if that leads elsewhere by now.  Raises OSError."""
        self._listener.renew()

    @property
    def pids(self) -> frozenset[int]:
        """The processes that are connected."""
        return frozenset(link.pid for link in self._links)

    def close(self) -> None:
        """Ends all connections and removes the socket."""
        for link in list(self._links):
            link.close()
        self._listener.close()

    def _accepted(self, connection: socket.socket, peer: Peer) -> None:
        is_told = self._told.admits(self._loop.now)
        link = _Connection(
            self._loop,
            connection,
            peer,
            self._relays,
            self._gateways,
            self._links,
            self._crowd,
            is_told=is_told,
        )
        self._links.add(link)
        if is_told:
            _log.info("tcp-relay connected", pid=peer.pid, suppressed=self._untold or None)
            self._untold = 0
        else:
            self._untold += 1


def _worded(reason: str) -> bytes:
    return emit(Refused(None, reason))


class _Connection:
    def __init__(
        self,
        loop: Loop,
        connection: socket.socket,
        peer: Peer,
        relays: Relays,
        gateways: GatewayPorts,
        links: "set[_Connection]",
        crowd: Crowd,
        *,
        is_told: bool,
    ) -> None:
        self.pid = peer.pid
        self._failures = Failures(_log)
        self._is_told = is_told
        self._peer = peer
        self._crowd = crowd
        self._loop = loop
        self._socket = connection
        self._relays = relays
        self._gateways = gateways
        self._links = links
        self._send = self.send  # one object: flows are recognised by it
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        loop.add(connection.fileno(), select.EPOLLIN, self._ready)
        relays.joined(self._send, peer.uid)

    def send(self, answer: Answer) -> None:
        if self not in self._links:
            return
        try:
            self._said(emit(answer))
        except OSError:
            # Full or gone; not closed here, where a caller may be in the middle of its flows.
            self._loop.call_soon(self.close)

    def _said(self, message: bytes) -> None:
        try:
            self._socket.send(message)
        except OSError as error:
            if error.errno not in HOST_FAILS:
                raise
            self._socket.send(message)  # once more, before all connections are resumed for it

    def close(self) -> None:
        if self not in self._links:
            return
        self._links.remove(self)
        self._crowd.leave(self._peer)
        try:
            self._loop.remove(self._socket.fileno())
            descriptors.hang_up(self._socket)
        finally:
            self._relays.lost(self._send, self._loop.now)
            self._gateways.lost(self._send)
            del self._send  # a circle, and the collector is off
        if self._is_told:
            _log.info("tcp-relay disconnected", pid=self.pid)

    def _ready(self, _: int) -> None:
        answers: list[Answer] = []
        goes_on = self._read(answers)
        if answers:
            self._relays.before_answers()
            for answer in answers:
                self.send(answer)
        if not goes_on:
            self.close()

    def _read(self, answers: list[Answer]) -> bool:
        """Handles what has come, and adds what is to be said to it; whether there may be more."""
        came: list[_Came] = []
        goes_on = self._receive(came)
        self._relays.expect((request for request, _ in came), self._send)
        for request, held in came:
            if self not in self._links:
                descriptors.close_all(held)
            elif (answer := self._answer(request, held)) is not None:
                answers.append(answer)
        return goes_on

    def _answer(self, request: Request | str, held: list[int]) -> Answer | None:
        """What is to be said to a message; the descriptors are taken over."""
        if isinstance(request, str):
            if (held_back := _malformed.admit(self._loop.now)) is not None:
                _log.warning(
                    "malformed message from tcp-relay",
                    pid=self.pid,
                    error=request,
                    suppressed=held_back or None,
                )
            return Refused(None, request)
        if isinstance(request, Listening | NotListening):
            return self._listening(request, held)
        return self._relays.handle(request, self._send, self._loop.now)

    def _receive(self, came: list[_Came]) -> bool:
        """Adds what has come, each with its descriptors; whether there may be more after it."""
        for _turn in range(MAX_PER_TURN):
            try:
                packet, held = descriptors.receive(self._socket, MAX_MESSAGE + 1)
            except BlockingIOError:
                return True
            except OSError as error:
                if error.errno in HOST_FAILS:  # what was said is still there to be read
                    self._failures.tell(self._loop.now, "tcp-relay can't be read from now", error)
                    return True
                packet, held = b"", []
            if not packet:
                descriptors.close_all(held)
                return False
            try:
                request = parse_request(packet)
                if held and not isinstance(request, Listening):
                    raise BadMessage("a descriptor comes with listening alone")
            except BadMessage as error:
                descriptors.close_all(held)
                came.append((str(error), []))  # not the error, whose traceback holds this list
                return False
            came.append((request, held))
        return True

    def _listening(self, request: Listening | NotListening, held: list[int]) -> Answer | None:
        """Where this tcp-relay listens has changed."""
        gport = request.gport
        if isinstance(request, NotListening):
            self._gateways.given_up(self._send, gport)
            return None
        if held and max(held) >= last_descriptor():
            descriptors.close_all(held)
            return Refused(request.id, "krelay has no descriptor left for one more socket")
        wrong = self._gateways.listening(self._send, gport, held)
        if wrong is None:
            self._relays.listens(self._send, gport)
            return None
        if (held_back := _not_listening.admit(self._loop.now)) is not None:
            _log.warning(
                "tcp-relay's listening socket refused",
                pid=self.pid,
                gport=gport,
                error=wrong,
                suppressed=held_back or None,
            )
        return Refused(request.id, wrong)
