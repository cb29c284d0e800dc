"""The gateway port: the listener that the file tree asks for, and those that still linger.

A new gateway port is listened on before the old one is given up: krelay rewrites to the one or to
the other, never to one that isn't listened on.  The old listener then lingers, because packets that
were rewritten a moment ago, and clients in the middle of their handshake, still arrive there.
Running connections don't notice any of it.

krelay, which leads clients here, is handed the listening sockets themselves (`PortObserver`): a
port number doesn't tell which program listens there.

A port that can't be had (taken, privileged) leaves the old listener in place and is tried again as
long as it is asked for.  That is logged, but for the first time where the port was given up last.
"""

import errno
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from knet.log import Log, Throttle
from knet.loop import Loop, Timer
from tcp_relay.engine.listener import PER_TURN, Listener
from tcp_relay.engine.sockets import Socket

LISTENER_LINGER = 3.0
"""Seconds: a SYN that was lost is sent again after 1 and 3 seconds (RFC 6298: RTO 1 s, doubled)."""

RETRY = 1.0
"""Seconds between attempts at a port that can't be had."""

Accepted = Callable[[int, Socket, Socket, tuple[Any, ...]], None]
"""As of a listener, but for the first, which is the gateway port."""


class PortObserver(Protocol):
    """Is told which gateway ports are listened on."""

    def listening(self, port: int, sock: Socket) -> None:
        """This port is, by this socket."""

    def not_listening(self, port: int) -> None:
        """The socket of this port will be closed."""


log = Log("gateway")


class Gateway:
    """Listens on one gateway port; `accepted` gets the clients, and `observer` is told.

    `shared`: other processes listen there as well.  `room` tells how many more may be accepted.
    """

    def __init__(
        self,
        loop: Loop,
        accepted: Accepted,
        observer: PortObserver,
        shared: bool = False,
        room: Callable[[], int] = lambda: PER_TURN,
    ) -> None:
        self._loop = loop
        self._observer = observer
        self._shared = shared
        self._room = room
        self._accepted = accepted
        self._current: Listener | None = None
        self._lingering: dict[Listener, Timer] = {}
        self._retry: Timer | None = None
        self._complaints = Throttle()
        self._asked: int | None = None
        self._given_up: int | None = None
        """The port that was closed last: krelay has its socket until it hears of that."""

    @property
    def port(self) -> int | None:
        """The port listened on; None before the first."""
        return self._current.port if self._current else None

    def listen_on(self, port: int) -> None:
        """Makes `port` the gateway port, now or as soon as it can be had."""
        if port != self._asked:
            self._asked = port
            self._complaints = Throttle()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        if self.port == port:
            return
        try:
            new = self._lingering_on(port) or self._listener(port)
        except OSError as error:
            if port != self._given_up:
                self._complain(port, error)
            self._given_up = None
            self._retry = self._loop.call_at(self._loop.now + RETRY, lambda: self.listen_on(port))
            return
        old, self._current = self._current, new
        log.info("listening", gport=port, before=old.port if old else None)
        if old is not None:
            self._lingering[old] = self._loop.call_at(
                self._loop.now + LISTENER_LINGER, lambda: self._give_up(old)
            )

    def resume(self) -> None:
        """A connection has ended: a listener that had paused may accept again."""
        if self._current is not None:
            self._current.resume()
        for listener in self._lingering:
            listener.resume()

    def close(self) -> None:
        """Accepts the clients that are in the kernel's queue still, then listens no more."""
        if self._retry is not None:
            self._retry.cancel()
        for listener, timer in self._lingering.items():
            timer.cancel()
            self._close(listener)
        self._lingering.clear()
        if self._current is not None:
            self._close(self._current)
            self._current = None

    def _listener(self, port: int) -> Listener:
        accepted = partial(self._accepted, port)
        listener = Listener(self._loop, port, accepted, shared=self._shared, room=self._room)
        self._observer.listening(port, listener.sock)
        return listener

    def _close(self, listener: Listener) -> None:
        self._observer.not_listening(
            listener.port
        )  # first: krelay is to lead no more clients there
        listener.close()

    def _lingering_on(self, port: int) -> Listener | None:
        for listener, timer in self._lingering.items():
            if listener.port == port:
                timer.cancel()
                del self._lingering[listener]
                return listener
        return None

    def _give_up(self, listener: Listener) -> None:
        del self._lingering[listener]
        self._close(listener)
        self._given_up = listener.port

    def _complain(self, port: int, error: OSError) -> None:
        if (suppressed := self._complaints.admit(self._loop.now)) is None:
            return
        log.error(
            "can't listen",
            gport=port,
            error=error.strerror,
            fix=_FIX.get(error.errno or 0),
            still=self.port,
            suppressed=suppressed or None,
        )


_FIX = {
    errno.EADDRINUSE: "end the program that listens there, or write another port into gport",
    errno.EACCES: "write a port from 1024 up into gport, or grant CAP_NET_BIND_SERVICE",
    errno.EMFILE: "raise the limit of open files (ulimit -n, LimitNOFILE=)",
}
