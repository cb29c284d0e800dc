"""Where a plain proxy's connections go: one destination, by name, at each of its addresses in turn.

No port is bound: the kernel chooses one when it connects, which is when it knows the whole session.
"""

import errno
import os
import socket
from collections.abc import Mapping
from typing import Any

from tcp_relay.engine.engine import Engine
from tcp_relay.engine.legs import Legs
from tcp_relay.engine.portqueue import PortWaitQueue
from tcp_relay.engine.session import End
from tcp_relay.engine.sockets import (
    HOST_FAILS,
    NO_ROOM,
    Socket,
    close,
    in_words,
    own_address,
    server_socket,
)
from tcp_relay.engine.timeouts import FixedTimeoutQueue
from tcp_relay.proxy.resolver import Address, Resolver

MEND = "sysctl net.ipv4.tcp_tw_reuse=1, or widen net.ipv4.ip_local_port_range"
"""Against a lack of local ports."""

_NO_PORT = (errno.EADDRNOTAVAIL, errno.EADDRINUSE)


class Proxy:
    """Connects every client to the destination that `resolver` knows."""

    def __init__(self, engine: Engine, resolver: Resolver) -> None:
        self.engine = engine
        self.resolver = resolver
        self.family = int(socket.AF_INET)
        """Of the first address, when a name was last resolved."""
        limit = engine.limits.connect
        self.asked: FixedTimeoutQueue[Legs] = FixedTimeoutQueue(
            engine.loop,
            limit,
            lambda legs: legs.end(End.CONNECT_FAILED, f"no answer to the name within {limit:g} s"),
        )
        self.port_queue = PortWaitQueue(engine.loop, MEND)

    def spare(self) -> Socket:
        """An unused socket, most likely of the right family."""
        return server_socket(self.family)

    def accepted(self, client: Socket, server: Socket, peer: tuple[Any, ...]) -> None:
        """A client is there, and an unused socket for its server leg.  Takes over both."""
        Attempt(self, client, server, peer).begin()


class Attempt:
    """A client's connection on its way to the destination, and its names afterwards."""

    __slots__ = ("_address", "_last_error", "_left", "_legs", "_peer", "_proxy", "_spare")

    def __init__(self, proxy: Proxy, client: Socket, spare: Socket, peer: tuple[Any, ...]) -> None:
        self._proxy = proxy
        self._peer = peer
        self._spare: Socket | None = spare
        self._address: Address | None = None
        self._left: list[Address] = []
        self._last_error = ""
        self._legs: Legs | None = Legs(proxy.engine, self, client)

    def begin(self) -> None:
        """Asks for the addresses."""
        self._proxy.resolver.ask(self._resolved)
        if self._address is None and self._legs is not None:
            self._legs.wait(self._proxy.asked)

    def connect(self) -> None:
        """Tries the address that is its turn."""
        legs = self._legs
        if legs is None:  # ended meanwhile
            return
        assert self._address is not None
        family, sockaddr = self._address
        spare, self._spare = self._spare, None
        try:
            if spare is None or spare.family != family:
                if spare is not None:
                    close(spare)  # first: its descriptor may be the last one
                legs.drop_server()
                spare = server_socket(family)
        except OSError as error:
            if error.errno in HOST_FAILS:
                self._wait_for_port(error)
            else:
                legs.end(End.CONNECT_FAILED, f"no socket: {in_words(error.errno)}")
            return
        legs.use_server(spare)
        legs.connect(sockaddr)

    def connected(self) -> None:
        """From the legs."""
        self._left = []

    def connect_failed(self, error: int) -> None:
        """From the legs."""
        assert self._address is not None
        if error in _NO_PORT and _is_routed(self._address):
            self._wait_for_port()
            return
        if error in NO_ROOM:
            self._wait_for_port(OSError(error, os.strerror(error)))
            return
        self._last_error = f"{_name(self._address[1])}: {in_words(error)}"
        self._next()

    def ended(self) -> None:
        """From the legs."""
        self._legs = None  # which refers to this: without a collector a circle is for ever
        if self._spare is not None:
            close(self._spare)
            self._spare = None

    def names(self) -> Mapping[str, object]:
        """Who is connected."""
        server = _name(self._address[1]) if self._address else None
        return {"client": _name(self._peer), "server": server}

    def _resolved(self, result: "list[Address] | OSError") -> None:
        if self._legs is None:
            return
        if isinstance(result, OSError):
            self._legs.end(End.CONNECT_FAILED, str(result))
            return
        self._left = list(result)
        self._proxy.family = result[0][0]
        self._next()

    def _next(self) -> None:
        assert self._legs is not None
        if not self._left:
            self._legs.end(End.CONNECT_FAILED, self._last_error)
            return
        self._address = self._left.pop(0)
        if self._proxy.port_queue:
            self._wait_for_port()
        else:
            self.connect()

    def _wait_for_port(self, error: OSError | None = None) -> None:
        assert self._legs is not None
        self._legs.wait_in(self._proxy.port_queue, self.connect, error)


def _is_routed(address: Address) -> bool:
    """Whether this host has an address to connect from; EADDRNOTAVAIL may say it hasn't."""
    try:
        own_address(address.family, address.sockaddr)
    except OSError as error:
        return error.errno in NO_ROOM  # not known
    return True


def _name(sockaddr: tuple[Any, ...]) -> str:
    host, port = str(sockaddr[0]), sockaddr[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
