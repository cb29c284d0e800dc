"""Questions about TCP sockets of this network namespace (linux/sock_diag.h, linux/inet_diag.h).

A question is a netlink header and a struct inet_diag_req_v2, an answer the header and a struct
inet_diag_msg with attributes.  Ports and addresses are in network order, all else the host's own:

    request   family, protocol, extensions, 0, states (bits by state), then the socket's id
    message   family, state, timer, retransmissions, the socket's id, then
              expires, receive queue, send queue, uid, inode
    id        ports (2 + 2), addresses (16 + 16; IPv4 in the first four bytes), device, cookie (8)

The cookie names a socket as long as the host runs, in all namespaces (SO_COOKIE); a number of an
inode comes again.
"""

import struct
from collections.abc import Callable, Iterator
from typing import NamedTuple

from knet import netlink
from knet.endpoint import Endpoint

FAMILY = 4
"""NETLINK_SOCK_DIAG."""
BY_FAMILY = 20
"""SOCK_DIAG_BY_FAMILY."""
IPV4, IPV6 = 2, 10
SYN_SENT, LISTEN = 2, 10
"""TCP_SYN_SENT, TCP_LISTEN (net/tcp_states.h)."""
CARRYING = frozenset({1, 4, 5, 8, 9, 11})
"""States of a connection that was accepted and that its program still has: ESTABLISHED, FIN_WAIT1,
FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING; in TIME_WAIT and SYN_RECV no program has it."""

_TCP = 6
_ANY_COOKIE = b"\xff" * 8
_REQUEST = struct.Struct("=BBBxIHH16s16sI8s")
_MESSAGE = struct.Struct("=BBBB4s16s16sI8sIIIII")
_PORTS = struct.Struct("!HH")
_V6ONLY = 11
"""INET_DIAG_SKV6ONLY."""
_MAPPED = bytes(10) + b"\xff\xff"
"""What an IPv4 address of an IPv6 socket begins with (RFC 4291, section 2.5.5.2)."""
_ALL = (1 << 12) - 1


class Socket(NamedTuple):
    """A TCP socket, as the kernel tells of it."""

    cookie: int
    uid: int
    """Of the process that made it, or accepted its connection."""
    state: int
    address: bytes
    """Its own, of four or sixteen bytes."""
    port: int
    is_v6_only: bool = False
    inode: int = 0

    def may_accept_for(self, is_own: Callable[[bytes], bool]) -> bool:
        """Whether this listener could get IPv4 connections to an address that `is_own`."""
        address = self.address
        if len(address) == 16:
            if self.is_v6_only:
                return False
            if address == bytes(16):
                return True
            if not address.startswith(_MAPPED):
                return False
            address = address[len(_MAPPED) :]
        return address == bytes(4) or is_own(address)


def listeners_on(port: int, family: int) -> bytes:
    """Asks for all sockets of this family that listen on this port."""
    return _request(netlink.DUMP, family, 1 << LISTEN, port=port)


def connection_between(local: Endpoint, remote: Endpoint) -> bytes:
    """Asks for the socket of this IPv4 connection; where there is none, a listener's is told."""
    return _request(
        0,
        IPV4,
        _ALL,
        port=local.port,
        peer=remote.port,
        addresses=(local.addr, remote.addr),
    )


def sockets(data: bytes) -> Iterator[Socket | int | None]:
    """What was answered: sockets, the errno of a refusal, None at the end of a list."""
    for message in netlink.messages(data):
        kind = message.subsystem << 8 | message.kind
        if kind == netlink.DONE:
            yield None
        elif (error := message.error) is not None:
            yield error
        elif kind == BY_FAMILY and len(message.body) >= _MESSAGE.size:
            yield _socket(message.body)


def carried_by(data: bytes) -> int | None:
    """The uid of the connection that was asked for; None if no process has it.

    As `sockets` tells it, in a third of the time.
    """
    length, kind, *_ = netlink.HEADER.unpack_from(data)
    if kind != BY_FAMILY or not netlink.HEAD + _MESSAGE.size <= length <= len(data):
        return None
    _, state, *_, uid, _ = _MESSAGE.unpack_from(data, netlink.HEAD)
    return uid if state in CARRYING else None


def _socket(body: bytes) -> Socket:
    family, state, _, _, ports, source, _, _, cookie, _, _, _, uid, inode = _MESSAGE.unpack_from(
        body
    )
    attributes = dict(netlink.attributes(body[_MESSAGE.size :]))
    return Socket(
        cookie=_cookie(cookie),
        uid=uid,
        state=state,
        address=source if family == IPV6 else source[:4],
        port=_PORTS.unpack(ports)[0],
        is_v6_only=any(attributes.get(_V6ONLY, b"")),
        inode=inode,
    )


def _cookie(words: bytes) -> int:
    """Two words of the host's own order, the lower one first (sock_diag_save_cookie)."""
    low, high = struct.unpack("=II", words)
    return int(high << 32 | low)


def _request(
    flags: int,
    family: int,
    states: int,
    *,
    port: int,
    peer: int = 0,
    addresses: tuple[bytes, bytes] = (b"", b""),
) -> bytes:
    source, destination = (address.ljust(16, b"\0") for address in addresses)
    ports = _PORTS.pack(port, peer)
    body = _REQUEST.pack(
        family,
        _TCP,
        0,
        states,
        *struct.unpack("=HH", ports),
        source,
        destination,
        0,
        _ANY_COOKIE,
    )
    return netlink.request(BY_FAMILY, flags, body)
