"""Accepting, bounded per turn, and what happens when descriptors run out.

A connection needs two descriptors, the client's and the server's.  The second is got first: with a
spare socket in hand, an accept that succeeds can always be carried on, and one that fails leaves
the client in the kernel's queue instead of half served. The spare stays for the next client.

Out of descriptors (or of kernel memory), a level-triggered listener would be reported ready for
ever, to no avail.  So it is taken out of the loop, and put back when a connection ends (`resume`)
or after a second, whichever is first.

What a client's socket needs is set on the listening one: accepted sockets inherit NODELAY,
KEEPALIVE, OOBINLINE and LINGER from it.
"""

import errno
import select
import socket
import struct
from collections.abc import Callable

from krelay.log import Log, Throttle
from krelay.loop import Loop, Timer

BACKLOG = 4096
PER_TURN = 64
"""Accepts per turn; more connections wait for the next one."""

RESETTING = struct.pack("ii", 1, 0)  # struct linger: on, for 0 seconds
IN_ORDER = struct.pack("ii", 0, 0)
"""SO_LINGER of a socket whose closing doesn't reset: FIN, and the kernel delivers what it has."""

PAUSE = 1.0
"""Seconds without accepting, unless a connection ends before."""

Accepted = Callable[[socket.socket, socket.socket, tuple[str, int]], None]
"""The client's socket, an unused one for the server, the client's address.

Both sockets are the callee's from then on.
"""

# accept(2): errors of the connection that was waiting, which is gone; the next may be fine.
_OF_THE_CLIENT = frozenset(
    {errno.ECONNABORTED, errno.ENETDOWN, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN}
    | {errno.ENONET, errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, errno.EPERM}
)

log = Log("listener")
_complaints = Throttle()


def set_options(sock: socket.socket) -> None:
    """What both legs have.

    Small writes go at once, a dead peer is noticed, urgent bytes stay in the stream (RFC 6093), and
    closing resets, unless IN_ORDER is set before.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESETTING)


def server_socket() -> socket.socket:
    """A socket for a server leg.

    SO_REUSEADDR: ports in TIME_WAIT may be bound; `connect` tells if one may not be used.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    set_options(sock)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    return sock


class Listener:
    """A listening socket on `port` of all addresses.  Raises OSError if that can't be had."""

    def __init__(self, loop: Loop, port: int, accepted: Accepted) -> None:
        self.port = port
        self._loop = loop
        self._accepted = accepted
        self._spare: socket.socket | None = None
        self._resuming: Timer | None = None
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            set_options(self._socket)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setblocking(False)
            self._socket.bind(("0.0.0.0", port))
            self._socket.listen(BACKLOG)
            loop.add(self._socket.fileno(), select.EPOLLIN, self._ready)
        except BaseException:
            self._socket.close()
            raise

    @property
    def paused(self) -> bool:
        """Nothing is accepted for now."""
        return self._resuming is not None

    def resume(self) -> None:
        """Accepts again, if it had been paused."""
        if self._resuming is not None:
            self._resuming.cancel()
            self._resuming = None
            self._loop.add(self._socket.fileno(), select.EPOLLIN, self._ready)

    def close(self) -> None:
        """Accepts who is in the queue still, then closes."""
        self.resume()
        for _ in range(BACKLOG // PER_TURN):
            if not self._accept():
                break
        self.abandon()

    def abandon(self) -> None:
        """Closes; the kernel resets who is in the queue."""
        if self._resuming is None:
            self._loop.remove(self._socket.fileno())
        else:
            self._resuming.cancel()
        self._socket.close()
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def _ready(self, _: int) -> None:
        self._accept()

    def _accept(self) -> bool:
        """Whether there may be more."""
        accept, accepted = self._socket.accept, self._accepted
        try:
            for _ in range(PER_TURN):
                server = self._spare or server_socket()
                self._spare = server
                try:
                    client, peer = accept()
                except BlockingIOError:
                    return False
                except OSError as error:
                    if error.errno in _OF_THE_CLIENT:
                        continue
                    raise
                self._spare = None
                accepted(client, server, peer)
        except OSError as error:
            self._pause(error)
            return False
        return True

    def _pause(self, error: OSError) -> None:
        self._loop.remove(self._socket.fileno())
        self._resuming = self._loop.call_at(self._loop.now + PAUSE, self.resume)
        if (suppressed := _complaints.admit(self._loop.now)) is not None:
            log.warning(
                "accepting paused",
                gport=self.port,
                error=error.strerror,
                mend="raise the limit of open files (ulimit -n, LimitNOFILE=)"
                if error.errno == errno.EMFILE
                else None,
                suppressed=suppressed or None,
            )
