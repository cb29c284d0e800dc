"""What this host is on the network: its addresses, and what lies beside the server.

Read through the kernel's routing socket when something has changed there, not when a packet comes.
One route is asked for, never the whole table, which on a router would take seconds: what is on a
link is told by the addresses that this host has there.

The rules act on what the kernel knows at that moment (`fib`), which may be news to krelay, though
it is told of changes: an address that has just arrived, and the addresses of a network that is
local by a route of its own (`ip route add local`), which none has been told of.  So for an address
that isn't among the known ones the kernel is asked at once (LocalAddresses).

The descriptors are opened at the start and kept: a host that has none left looks all the same.
"""

import errno
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import IPv4Address

from knet import localports, netlink
from knet.netlink import Message, rtnetlink
from knet.netlink.socket import NetlinkSocket
from knet.networks import network
from krelay.host.hostview import LOOPBACK, HostView

_GROUPS = 0x1 | 0x10 | 0x40
"""RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE (linux/rtnetlink.h)."""
PATIENCE = 2.0
"""Seconds for an answer of the kernel's, which mostly is there at once."""
MOST_LOCAL = 4096
"""Addresses that are known to be local beside those that this host is told of."""
_FORWARD = "/proc/sys/net/ipv4/ip_forward"
_LIST = 1 << 20
"""Bytes of the list of reserved ports: more than the longest takes."""


class Looker:
    """Looks at this host.  Raises OSError if it can't be looked at."""

    def __init__(self) -> None:
        self._sequence = 0
        self._unfinished = False
        """Whether answers to a look that failed may still come."""
        self._forward = os.open(_FORWARD, os.O_RDONLY | os.O_CLOEXEC)
        self._reserved = -1
        self._reserved_text = b""
        self._reserved_ports: frozenset[int] = frozenset()
        try:
            self._reserved = os.open(localports.RESERVED, os.O_RDONLY | os.O_CLOEXEC)
            self._socket = NetlinkSocket(rtnetlink.FAMILY, timeout=PATIENCE)
        except BaseException:
            os.close(self._forward)
            if self._reserved >= 0:
                os.close(self._reserved)
            raise

    def look(self, server: IPv4Address) -> HostView:
        """How things are now.  Raises OSError if the kernel doesn't tell; then look once more."""
        if self._unfinished:
            self._finish()
        self._unfinished = True
        addresses = list(rtnetlink.addresses(self._ask(rtnetlink.get_addresses(self._next()))))
        link, towards, _ = self._way_to(server)
        mtu = None
        if link is not None:
            with suppress(_NoAnswer):  # it went meanwhile
                asked = self._ask(rtnetlink.get_link(self._next(), link), answers=1)
                mtu = rtnetlink.mtu(asked)
        own = frozenset(each.local for each in addresses if each.local[0] != LOOPBACK)
        beside = tuple(network(each.beyond, each.length) for each in addresses if each.link == link)
        forwards = os.pread(self._forward, 16, 0).strip() != b"0"
        reserved = self.reserved()
        beside = beside if any(server in net for net in beside) else ()
        self._unfinished = False
        return HostView(own, beside, towards, forwards, min(0xFFFF, mtu or 0xFFFF), reserved)

    def reserved(self) -> frozenset[int]:
        """HostView.reserved, now: changes aren't announced.  Raises OSError."""
        text = os.pread(self._reserved, _LIST, 0)
        if text != self._reserved_text:
            self._reserved_ports = localports.reserved(text.decode())
            self._reserved_text = text
        return self._reserved_ports

    def close(self) -> None:
        """Lets go of what it has open."""
        self._socket.close()
        os.close(self._forward)
        os.close(self._reserved)

    def _way_to(self, server: IPv4Address) -> rtnetlink.RouteLookup:
        try:
            request = rtnetlink.get_route(self._next(), server.packed)
            return rtnetlink.route(self._ask(request, answers=1))
        except _NoAnswer as error:
            if error.errno not in _NO_ROUTE:
                raise
            return rtnetlink.RouteLookup(None, None)

    def _finish(self) -> None:
        """Reads what a look that failed has left: the kernel gives no other list before (EBUSY)."""
        self._socket.setblocking(False)
        with suppress(BlockingIOError):
            for _ in range(100):
                self._socket.recv(1 << 16)
        self._socket.settimeout(PATIENCE)

    def _next(self) -> int:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        return self._sequence

    def _ask(self, request: bytes, answers: int | None = None) -> Iterator[Message]:
        """What the kernel answers to this: so many messages, or all until it says that it is done.

        What is late to an earlier request is passed over.  Raises OSError, and of these _NoAnswer
        if the kernel says so itself.
        """
        self._socket.sendto(request, (0, 0))
        give_up = time.monotonic() + PATIENCE
        while time.monotonic() < give_up:
            for message in netlink.messages(self._socket.recv(1 << 16)):
                if message.sequence != self._sequence:
                    continue
                if (message.subsystem, message.kind) == (0, netlink.DONE):
                    return
                if code := message.error:
                    raise _NoAnswer(code, os.strerror(code))
                yield message
                if answers is not None and (answers := answers - 1) == 0:
                    return
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))


class LocalAddresses:
    """Which addresses this host has at this moment, as the kernel's rules see it.

    An answer takes the kernel some microseconds.  That an address is local is known until something
    changes (`forget`); that it isn't, for the moment of the request alone.
    """

    def __init__(self) -> None:
        self._local: set[bytes] = set()
        self._others: dict[bytes, bool | None] = {}
        self._asked_at = -1.0
        self._sequence = 0
        # What is asked is answered before `send` returns.
        self._socket = NetlinkSocket(rtnetlink.FAMILY, timeout=0)

    def has(self, address: bytes, now: float) -> bool | None:
        """Whether this is an address of this host; None if the kernel doesn't tell."""
        if address in self._local:
            return True
        if now != self._asked_at:
            self._asked_at = now
            self._others.clear()
        if address in self._others:
            return self._others[address]
        found = self._ask(address)
        if not found:
            self._others[address] = found
            return found
        if len(self._local) >= MOST_LOCAL:
            self._local.clear()
        self._local.add(address)
        return True

    def forget(self) -> None:
        """Links, addresses or routes have changed."""
        self._local.clear()
        self._asked_at = -1.0

    def close(self) -> None:
        """Asks nothing more."""
        self._socket.close()

    def _ask(self, address: bytes) -> bool | None:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        try:
            self._socket.sendto(rtnetlink.get_route(self._sequence, address), (0, 0))
            while True:
                for message in netlink.messages(self._socket.recv(1 << 13)):
                    if message.sequence != self._sequence:
                        continue  # what is late to a request that failed
                    if code := message.error:
                        return False if code in _NO_ROUTE else None
                    return rtnetlink.route([message]).is_local
        except OSError:
            return None


class _NoAnswer(OSError):
    """The kernel answers by an error."""


_NO_ROUTE = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL, errno.ESRCH)
"""What the kernel says of an address that it would send nothing to; EACCES: `ip route prohibit`."""


class LinkWatcher:
    """Tells when links, addresses or routes have changed."""

    def __init__(self) -> None:
        self._socket = NetlinkSocket(rtnetlink.FAMILY, groups=_GROUPS, timeout=0)

    def fileno(self) -> int:
        """Readable when something has changed."""
        return self._socket.fileno()

    def drain(self) -> None:
        """Forgets what was told: the caller looks at the host itself."""
        for _ in self._socket.waiting():
            pass

    def close(self) -> None:
        """Stops watching."""
        self._socket.close()
