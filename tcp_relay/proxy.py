"""Where a plain proxy's connections go: one destination, by name, at each of its addresses in turn.

The kernel chooses the local port, when it connects.  It may run out of them: each connection that
this side has closed first keeps its port in TIME_WAIT for a minute.  The client can't help it, and
it passes; so nobody is refused for that.  Who finds no port waits in line, and the first of the
line tries again now and then: one of them, because a search in vain is long.
"""

import errno
import os
import socket
from collections import deque
from collections.abc import Mapping
from typing import Any

from krelay.log import Log, Throttle
from tcp_relay.engine import Engine
from tcp_relay.pair import End
from tcp_relay.pump import Pump
from tcp_relay.resolver import Address, Resolver
from tcp_relay.sockets import Socket, server_socket
from tcp_relay.waiting import Waiting

PORT_RETRY = 0.05
"""Seconds between looks for a free local port."""

_NO_PORT = (errno.EADDRNOTAVAIL, errno.EADDRINUSE)

log = Log("proxy")


class Proxy:
    """Connects every client to the destination that `resolver` knows."""

    def __init__(self, engine: Engine, resolver: Resolver) -> None:
        self.engine = engine
        self.resolver = resolver
        self.family = int(socket.AF_INET)
        """Of the address that was tried first last."""
        limit = engine.limits.connect
        self.asked: Waiting[Pump] = Waiting(
            engine.loop,
            limit,
            lambda pump: pump.end(End.CONNECT_FAILED, f"no answer to the name within {limit:g} s"),
        )
        self._in_line: deque[Attempt] = deque()
        self._complaints = Throttle()

    def spare(self) -> Socket:
        """An unused socket, most likely of the right family."""
        return server_socket(self.family)

    def accepted(self, client: Socket, server: Socket, peer: tuple[Any, ...]) -> None:
        """A client is there, and an unused socket for its server leg.  Takes over both."""
        Attempt(self, client, server, peer).begin()

    def line_up(self, attempt: "Attempt") -> None:
        """It found no local port: it will try again."""
        loop = self.engine.loop
        if not self._in_line:
            loop.call_at(loop.now + PORT_RETRY, self._try_again)
        self._in_line.append(attempt)
        if (suppressed := self._complaints.admit(loop.now)) is not None:
            log.warning(
                "no local port is free",
                waiting=len(self._in_line),
                mend="sysctl net.ipv4.tcp_tw_reuse=1, or widen net.ipv4.ip_local_port_range",
                suppressed=suppressed or None,
            )

    def has_line(self) -> bool:
        """Somebody waits for a port already."""
        return bool(self._in_line)

    def _try_again(self) -> None:
        line, self._in_line = self._in_line, deque()
        while line and not self._in_line:
            line.popleft().connect()
        if line:  # the last one found none
            self._in_line.extend(line)


class Attempt:
    """A client's connection on its way to the destination, and its names afterwards."""

    __slots__ = ("_address", "_last_error", "_left", "_peer", "_proxy", "_pump", "_spare")

    def __init__(self, proxy: Proxy, client: Socket, spare: Socket, peer: tuple[Any, ...]) -> None:
        self._proxy = proxy
        self._peer = peer
        self._spare: Socket | None = spare
        self._address: Address | None = None
        self._left: list[Address] = []
        self._last_error = ""
        self._pump: Pump | None = Pump(proxy.engine, self, client)

    def begin(self) -> None:
        """Asks for the addresses."""
        self._proxy.resolver.ask(self._resolved)
        if self._address is None and self._pump is not None:
            self._pump.wait(self._proxy.asked)

    def connect(self) -> None:
        """Tries the address that is its turn."""
        pump = self._pump
        if pump is None:  # ended meanwhile
            return
        assert self._address is not None
        family, sockaddr = self._address
        spare, self._spare = self._spare, None
        try:
            if spare is None or spare.family != family:
                if spare is not None:
                    spare.close()  # first: its descriptor may be the last one
                pump.drop_server()
                spare = server_socket(family)
        except OSError as error:
            pump.end(End.CONNECT_FAILED, f"no socket: {_words(error.errno)}")
            return
        pump.use_server(spare)
        pump.connect(sockaddr)

    def connected(self) -> None:
        """From the pump."""
        self._left = []

    def connect_failed(self, error: int) -> None:
        """From the pump."""
        assert self._address is not None
        if error in _NO_PORT:
            self._proxy.line_up(self)
            return
        self._last_error = f"{_name(self._address[1])}: {_words(error)}"
        self._next()

    def ended(self) -> None:
        """From the pump."""
        self._pump = None  # which refers to this: without a collector a circle is for ever
        if self._spare is not None:
            self._spare.close()
            self._spare = None

    def names(self) -> Mapping[str, object]:
        """Who is connected."""
        server = _name(self._address[1]) if self._address else None
        return {"client": _name(self._peer), "server": server}

    def _resolved(self, result: "list[Address] | OSError") -> None:
        if self._pump is None:
            return
        if isinstance(result, OSError):
            self._pump.end(End.CONNECT_FAILED, str(result))
            return
        self._left = list(result)
        self._proxy.family = result[0][0]
        self._next()

    def _next(self) -> None:
        assert self._pump is not None
        if not self._left:
            self._pump.end(End.CONNECT_FAILED, self._last_error)
            return
        self._address = self._left.pop(0)
        if self._proxy.has_line():
            self._proxy.line_up(self)
        else:
            self.connect()


def _name(sockaddr: tuple[Any, ...]) -> str:
    host, port = str(sockaddr[0]).removeprefix("::ffff:"), sockaddr[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _words(error: int | None) -> str:
    return os.strerror(error or 0).lower()
