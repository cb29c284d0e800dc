"""Sockets of both legs, and how they close.

Closing resets (SO_LINGER, 0 seconds), also when it is the kernel that closes because this process
was killed: no peer must take half a file for the whole.  Only for a session that has ended in
order is that switched off.
"""

import ctypes
import errno
import fcntl
import os
import socket
import struct
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple, TypeAlias

from knet import loop

Socket: TypeAlias = socket.SocketType
"""What socket.socket is made of; that one's constructor and `accept` take long, in Python."""

_RESETTING = struct.pack("ii", 1, 0)  # struct linger: on, for 0 seconds
_IN_ORDER = struct.pack("ii", 0, 0)
_STREAM, _NONBLOCK = int(socket.SOCK_STREAM), int(socket.SOCK_NONBLOCK)
_TCP = int(socket.IPPROTO_TCP)
_PROBING = (socket.TCP_KEEPCNT, socket.TCP_KEEPINTVL, socket.TCP_KEEPIDLE)
"""In this order: the last sets the timer anew, which may be due at once and then takes the others
(net/ipv4/tcp_timer.c, tcp_keepalive_timer)."""
_PROBES = 3
_PATIENCE = 127
"""Unanswered probes that the kernel may send: its most.  Which peer is lost is for this process to
judge (`Heard.is_silent`), because the kernel doesn't know when it was this host that stood
still."""
_SECOND_LOOK = 1.0
"""Seconds that an answer to what was sent last may take before its absence means anything."""
_TCP_RTO_MAX_MS = 44  # linux/tcp.h, from 6.15 on
HASTE = 8000
"""Milliseconds between two window probes, or retransmissions, to a sink that is waited for."""
_INFO = struct.Struct("=3xB20xI16xI8xI60xQ")
_setsockopt = ctypes.CDLL(None, use_errno=True).setsockopt
_SOCKET, _LINGER = int(socket.SOL_SOCKET), int(socket.SO_LINGER)
_SIOCOUTQ = 0x5411  # linux/sockios.h
SIOCATMARK = 0x8905  # asm-generic/sockios.h

NO_ROOM = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of a host that has no descriptor or no memory left just now: it passes."""
HOST_FAILS = loop.HOST_FAILS | {errno.EINTR}
"""Likewise; also of what is called past Python, which calls again by itself after a signal."""


def set_options(sock: Socket) -> None:
    """What both legs have.

    Small writes go at once, a dead peer is noticed, urgent bytes stay in the stream (RFC 6093), and
    closing resets.  Accepted sockets inherit all of it from the listening one.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    _linger(sock, _RESETTING)


def server_socket(family: int = socket.AF_INET) -> Socket:
    """A socket for a server leg."""
    sock = socket.SocketType(family, _STREAM | _NONBLOCK)
    set_options(sock)
    return sock


def own_address(family: int, sockaddr: tuple[Any, ...]) -> str:
    """The address of this host from which the kernel would connect there.

    Raises OSError: there is no route to it, or the kernel can't tell now (HOST_FAILS).
    """
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.connect(sockaddr)  # of a datagram socket: sends nothing, but makes the kernel choose
        host: str = sock.getsockname()[0]
        return host


def accept(listening: Socket, family: int) -> tuple[Socket, tuple[Any, ...]]:
    """A client's socket and address.  Raises OSError as accept(2) does."""
    fd, peer = listening._accept()  # type: ignore[attr-defined]
    try:
        sock = socket.SocketType(family, _STREAM, 0, fd)
    except BaseException:
        os.close(fd)
        raise
    sock.setblocking(False)
    return sock, peer


def close(sock: Socket) -> None:
    """Closes by a reset.  What the kernel says to it changes nothing: the descriptor is free."""
    with suppress(OSError):
        sock.close()


def close_in_order(sock: Socket) -> None:
    """Closes behind a FIN; the kernel goes on delivering what it still has."""
    with suppress(OSError):
        _linger(sock, _IN_ORDER)
    close(sock)


def _linger(sock: Socket, how: bytes) -> None:
    # Not by the socket's own `setsockopt`: given bytes, it makes an error of their being no number,
    # and another one, before it takes them for what they are.
    if _setsockopt(sock.fileno(), _SOCKET, _LINGER, how, len(how)):
        raise OSError(ctypes.get_errno(), "can't set SO_LINGER")


def error_of(sock: Socket) -> int:
    """The error that it has, an errno, which it has no more then (SO_ERROR); 0: none."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    except OSError as error:
        return error.errno or 0


def error_ahead(sock: Socket) -> int:
    """The error, an errno, that a read would meet, and meets all the same afterwards; 0: none."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return 0
    except OSError as error:
        return 0 if error.errno in HOST_FAILS else error.errno or 0
    return 0


def set_dscp(sock: Socket, dscp: int) -> None:
    """Its packets have this DSCP from now on; ECN is left to the kernel (ip(7), IP_TOS)."""
    with suppress(OSError):  # it changes no byte of what is relayed
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, dscp << 2)


def at_mark(sock: Socket) -> bool:
    """Whether the next byte to be read is urgent (tcp(7), SIOCATMARK)."""
    try:
        return any(fcntl.ioctl(sock.fileno(), SIOCATMARK, b"\0\0\0\0"))
    except OSError:
        return False  # it is in the stream all the same


def undelivered(sock: Socket) -> int:
    """Bytes (and the FIN) that the kernel holds and the peer hasn't acknowledged."""
    return int.from_bytes(fcntl.ioctl(sock.fileno(), _SIOCOUTQ, b"\0\0\0\0"), "little")


def probe_within(sock: Socket, seconds: float) -> None:
    """A peer that says nothing is asked three times in that many seconds: whole ones, from 4 on.

    Not while it has taken not all that was sent: then the kernel asks otherwise, and less and less
    often (`hasten`).
    """
    interval = max(1, int(seconds) // 5)
    idle = max(1, int(seconds) - _PROBES * interval)
    _set_probing(sock, (_PATIENCE, interval, idle))


def probe_as_usual(sock: Socket) -> None:
    """As the kernel does by itself: after two hours of silence (tcp(7), tcp_keepalive_time)."""
    _set_probing(sock, usual_probing())


def _set_probing(sock: Socket, values: tuple[int, ...]) -> None:
    for option, value in zip(_PROBING, values, strict=True):
        sock.setsockopt(_TCP, option, value)


@cache
def usual_probing() -> tuple[int, ...]:
    """The kernel's own values; to be asked for while there is a descriptor for it."""
    with socket.socket() as sock:
        return tuple(sock.getsockopt(_TCP, option) for option in _PROBING)


class Heard(NamedTuple):
    """What the kernel knows of a peer, from struct tcp_info (linux/tcp.h)."""

    probes: int
    """Probes since it answered one (tcpi_probes)."""
    in_flight: int
    """Segments that it has not acknowledged (tcpi_unacked)."""
    sent: float
    """Seconds since bytes were sent to it, also again (tcpi_last_data_sent)."""
    ago: float
    """Seconds since it acknowledged anything, also a probe (tcpi_last_ack_recv)."""
    acked: int
    """Bytes that it has acknowledged in all (tcpi_bytes_acked)."""

    def is_silent(self, seconds: float, awake: float) -> bool:
        """It was asked for so long, and has answered nothing.

        A peer that is slow answers: its kernel acknowledges each probe of a closed window (RFC
        9293, section 3.8.6.1).  The silence counts while this process was `awake`, in seconds.
        """
        if min(self.ago, awake) < seconds:
            return False
        if self.in_flight:
            return _SECOND_LOOK <= self.sent < self.ago
        return self.probes >= 2


def heard(sock: Socket) -> Heard:
    """Raises OSError."""
    info = sock.getsockopt(_TCP, socket.TCP_INFO, _INFO.size)
    probes, in_flight, sent, ago, acked = _INFO.unpack(info)
    return Heard(probes, in_flight, sent / 1000, ago / 1000, acked)


def hasten(sock: Socket) -> None:
    """The kernel asks a peer whose window is closed every HASTE at least, not every two minutes.

    Before Linux 6.15 it can't be told to.
    """
    _set_rto_max(sock, HASTE)


def take_time(sock: Socket) -> None:
    """As the kernel does by itself: what it delivers after a close may need that time.

    An orphan whose next probe is as late as it may be is reset (tcp_timer.c, tcp_probe_timer).
    """
    if rto_max := usual_rto_max():
        _set_rto_max(sock, rto_max)


def _set_rto_max(sock: Socket, milliseconds: int) -> None:
    if usual_rto_max():
        sock.setsockopt(_TCP, _TCP_RTO_MAX_MS, milliseconds)


@cache
def usual_rto_max() -> int:
    """The kernel's own, in milliseconds; 0 if it can't be told another.

    To be asked for while there is a descriptor for it.
    """
    with socket.socket() as sock:
        try:
            return sock.getsockopt(_TCP, _TCP_RTO_MAX_MS)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
            return 0


def in_words(error: int | None) -> str:
    """An errno, as it stands in logs."""
    return os.strerror(error or 0).lower()
