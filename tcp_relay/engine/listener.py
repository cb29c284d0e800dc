"""Accepting, bounded per turn, and what happens when descriptors run out.

A connection needs two descriptors, the client's and the server's.  So no more are accepted than
there is room for, two descriptors each and some for all else (Engine.room), and the second is got
first: with a spare socket in hand, an accept that succeeds can always be carried on, and one that
fails leaves the client in the kernel's queue instead of half served. The spare stays for the
next client.  A client that is accepted, but can't be waited for (epoll_ctl: no memory, or
fs.epoll.max_user_watches), is kept and handed over later.

Out of room, descriptors or kernel memory, a level-triggered listener would be reported ready for
ever, to no avail.  So it is taken out of the loop, and put back when a connection ends (`resume`)
or after a second, whichever is first.

What a client's socket needs is set on the listening one, from which accepted sockets inherit it.
"""

import errno
import os
import select
import socket
from collections.abc import Callable
from typing import Any

from knet.log import Log, Throttle
from knet.loop import Loop, Timer
from tcp_relay.engine.sockets import Socket, accept, close, server_socket, set_options

BACKLOG = 4096
PER_TURN = 64
"""Accepts per turn; more connections wait for the next one."""

PAUSE = 1.0
"""Seconds without accepting, unless a connection ends before."""

Accepted = Callable[[Socket, Socket, tuple[Any, ...]], None]
"""The client's socket, an unused one for the server, the client's address.

Both sockets are the callee's from then on; but if it raises an OSError it has taken neither.
"""

# accept(2): errors of the connection that was waiting, which is gone; the next may be fine.
_OF_THE_CLIENT = frozenset(
    {errno.ECONNABORTED, errno.ENETDOWN, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN}
    | {errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, errno.EPERM}
)

log = Log("listener")
_complaints = Throttle()


class Listener:
    """A listening socket on `port` of `address`; `::` is all addresses of IPv6, and no others.

    `shared`: other processes of this user may listen there as well (SO_REUSEPORT).  `spare` makes
    the unused sockets.  `room` tells how many more may be accepted.  Raises OSError if the port
    can't be had.
    """

    def __init__(
        self,
        loop: Loop,
        port: int,
        accepted: Accepted,
        *,
        address: str = "0.0.0.0",
        shared: bool = False,
        spare: Callable[[], Socket] = server_socket,
        room: Callable[[], int] = lambda: PER_TURN,
    ) -> None:
        self.port = port
        self._loop = loop
        self._accepted = accepted
        self._make_spare = spare
        self._room = room
        self._spare: Socket | None = None
        self._kept: tuple[Socket, Socket, tuple[Any, ...]] | None = None
        self._resuming: Timer | None = None
        self._family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = _listening(self._family, address, port, shared)
        try:
            loop.add(self._socket.fileno(), select.EPOLLIN, self._ready)
        except BaseException:
            self._socket.close()
            raise

    @property
    def sock(self) -> socket.socket:
        """The listening socket, which stays this object's own."""
        return self._socket

    @property
    def paused(self) -> bool:
        """Nothing is accepted for now."""
        return self._resuming is not None

    def resume(self) -> None:
        """Accepts again, if it had been paused."""
        if self._resuming is None:
            return
        self._resuming.cancel()
        self._resuming = None
        try:
            self._loop.add(self._socket.fileno(), select.EPOLLIN, self._ready)
        except OSError as error:
            self._wait(error)
            return
        if self._kept is not None:  # no event tells of it
            self._loop.call_soon(self._again)

    def close(self) -> None:
        """Accepts the clients that are in the kernel's queue still, then closes."""
        for _ in range(BACKLOG // PER_TURN):
            if not self._accept():
                break
        self.abandon()

    def abandon(self) -> None:
        """Closes; the kernel resets the clients in its queue."""
        if self._resuming is None:
            self._loop.remove(self._socket.fileno())
        else:
            self._resuming.cancel()
            self._resuming = None
        close(self._socket)
        client, server, _ = self._kept or (None, None, None)
        for sock in (self._spare, client, server):
            if sock is not None:
                close(sock)
        self._spare = self._kept = None

    def _ready(self, _: int) -> None:
        self._accept()

    def _again(self) -> None:
        if self._kept is not None and self._resuming is None:
            self._accept()

    def _accept(self) -> bool:
        """Whether there may be more."""
        listening, family = self._socket, self._family
        try:
            if self._kept is not None:
                self._hand_over(*self._kept)
            server = self._spare or self._make_spare()
            self._spare = server
            if self._room() <= 0:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            for _ in range(min(PER_TURN, self._room())):
                self._spare = server
                try:
                    client, peer = accept(listening, family)
                except BlockingIOError:
                    return False
                except OSError as error:
                    if error.errno in _OF_THE_CLIENT:
                        continue
                    raise
                self._spare = None
                self._hand_over(client, server, peer)
                server = self._make_spare()
            self._spare = server
        except OSError as error:
            self._pause(error)
            return False
        return True

    def _hand_over(self, client: Socket, server: Socket, peer: tuple[Any, ...]) -> None:
        self._kept = client, server, peer
        self._accepted(client, server, peer)
        self._kept = None

    def _pause(self, error: OSError) -> None:
        if self._resuming is None:
            self._loop.remove(self._socket.fileno())
            self._wait(error)

    def _wait(self, error: OSError) -> None:
        self._resuming = self._loop.call_at(self._loop.now + PAUSE, self.resume)
        if (suppressed := _complaints.admit(self._loop.now)) is not None:
            log.warning(
                "accepting paused",
                port=self.port,
                error=error.strerror,
                fix="raise the limit of open files (ulimit -n, LimitNOFILE=)"
                if error.errno == errno.EMFILE
                else None,
                suppressed=suppressed or None,
            )


def _listening(family: int, address: str, port: int, shared: bool) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        set_options(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:  # one for both is slower for IPv4
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock
