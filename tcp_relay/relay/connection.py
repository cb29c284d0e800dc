"""One relayed connection, from accept to its end.

    bind port y -> ask krelay -> connect to the server -> pump -> ended
         ^____________|______________|   another y, if this one is taken

Where it stands follows from what it has: no `server` yet, krelay is being asked; not connected yet,
the server is.  One timer guards whichever wait is under way.  The port is bound before krelay is
asked, because krelay has to know it before the first SYN passes; so the kernel can't know yet
whether the four addresses together are free, and says so in `connect`.
"""

import errno
import os
import socket
from collections.abc import Mapping
from typing import Protocol

from knet.endpoint import Endpoint, Source
from krelay.registration.messages import NO_ADDRESS, PORT_TAKEN, Dscps, Opened, Refused
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.legs import Legs
from tcp_relay.engine.portqueue import PortWaitQueue
from tcp_relay.engine.session import End
from tcp_relay.engine.sockets import HOST_FAILS, NO_ROOM, Socket, in_words, server_socket
from tcp_relay.engine.timeouts import FixedTimeoutQueue

PORT_TRIES = 8
"""Relay ports tried for one connection, before it waits in the port wait queue."""

_TRY_ANOTHER_PORT = (errno.EADDRNOTAVAIL, errno.EADDRINUSE)
_PASSES = HOST_FAILS | {errno.EADDRNOTAVAIL}
"""Errors of making a socket or binding it; the own address may just be changing."""
_ANY = "0.0.0.0"
UNMARKED: Dscps = (0, 0)


class ConnectionOwner(Protocol):
    """What a connection asks of its relay."""

    keeps_dscp: bool
    """Whether each leg sends with the DSCP with which the other end does."""
    asked: FixedTimeoutQueue[Legs]
    """For connections that have asked krelay."""
    port_queue: PortWaitQueue
    """For connections that found no relay port."""

    def own_address(self, connection: "Connection") -> str:
        """The local address for its server leg."""

    def next_port(self) -> int:
        """A relay port to try; 0 leaves it to the kernel."""

    def forget_address(self) -> None:
        """What `own_address` said was no address of this host."""

    def register(self, connection: "Connection") -> bool:
        """Its relay port is bound: ask krelay.  False if another connection has that port."""

    def unregister(self, connection: "Connection", tell: bool) -> None:
        """Its relay port is given up; `tell` krelay."""


class Connection:
    """A client's connection.  Owns both sockets through its legs."""

    __slots__ = (
        "__weakref__",
        "_dscp",
        "_legs",
        "_may_have_flow",
        "_owner",
        "_socket",
        "_tries",
        "client",
        "gport",
        "is_waiting_for_port",
        "message_id",
        "origin",
        "relay",
        "seen",
        "server",
        "source",
    )

    def __init__(
        self,
        engine: Engine,
        owner: ConnectionOwner,
        gport: int,
        client: Socket,
        peer: tuple[str, int],
    ) -> None:
        self.client = Endpoint.of(*peer)
        self.gport = gport
        """The gateway port that the client's packets were delivered to."""
        self.relay: Endpoint | None = None
        """The own end of the server leg, while it is registered."""
        self.server: Endpoint | None = None
        self.source: Source | None = None
        self.origin: Endpoint | None = None
        """The client as its own packets read, where that is another port than `client` has."""
        self.seen: Endpoint | None = None
        """The client as the server sees it, where that is another port than `relay` has."""
        self.message_id = -1
        """Of the last message about it."""
        self.is_waiting_for_port = False
        """It has no socket or no port for the server leg now, and so nothing to ask krelay."""
        self._owner = owner
        self._dscp = UNMARKED
        self._socket = client
        self._tries = 0
        self._may_have_flow = False
        self._legs = Legs(engine, self, client)

    @property
    def host(self) -> str:
        """The relay's address that the client's packets were delivered to."""
        try:
            host: str = self._socket.getsockname()[0]  # not kept: most connections end unasked
        except OSError:
            return _ANY
        return host

    @property
    def service(self) -> Endpoint | None:
        """What the client asked for, once it is known: the server's port at the relay's address."""
        return self.server and Endpoint.of(self.host, self.server.port)

    def begin(self, server: Socket) -> None:
        """Binds `server`, which is taken over, and has krelay asked."""
        self._tries += 1
        self.is_waiting_for_port = False
        self._legs.use_server(server)
        try:
            relay = self._bind(server)
        except OSError as error:
            self._no_socket(error)
            return
        if self.relay is not None:
            self._owner.unregister(self, tell=False)  # krelay will hear of the new port instead
        self.relay = relay
        self._may_have_flow = True
        self._legs.wait(self._owner.asked)
        if not self._owner.register(self):
            self.relay = None
            self._another_port()

    def opened(self, answer: Opened) -> None:
        """krelay has a flow for it: connect."""
        self.server, self.source = answer.server, answer.source
        self.origin, self.seen = answer.origin, answer.seen
        self._dscp = UNMARKED  # of a new socket
        self.marked(answer.dscp)
        self._legs.connect((answer.server.host, answer.server.port))

    def marked(self, dscp: Dscps) -> None:
        """The client sends with the first DSCP, the server with the second: so does this host to
        the other one.  ECN is each leg's own (RFC 3168, section 6.1)."""
        if dscp != self._dscp and self._owner.keeps_dscp and self.server is not None:
            self._dscp = dscp
            self._legs.send_with(*dscp)

    def refused(self, answer: Refused) -> None:
        """krelay has no flow for it, or has it no more."""
        self._may_have_flow = False
        if answer.error == NO_ADDRESS and self.server is None:
            self._owner.forget_address()  # it has just changed
            self._another_port()
        elif answer.error == PORT_TAKEN and self.server is None:
            self._another_port()
        else:
            self._refuse(f"krelay: {answer.error}")

    def abort(self, end: End, detail: str, tell: bool = True) -> None:
        """Resets both sides; `tell` krelay."""
        self._may_have_flow &= tell
        self._legs.end(end, detail)

    def connected(self) -> None:
        """From the legs."""

    def connect_failed(self, error: int) -> None:
        """From the legs."""
        if error in _TRY_ANOTHER_PORT:
            self._another_port()
        elif error in NO_ROOM:
            self._no_socket(OSError(error, os.strerror(error)))
        else:
            self._legs.end(End.CONNECT_FAILED, f"server: {in_words(error)}")

    def ended(self) -> None:
        """From the legs."""
        self._owner.unregister(self, self._may_have_flow)

    def names(self) -> Mapping[str, object]:
        """Who is connected."""
        return {
            "client": self.origin or self.client,
            "service": self.service,
            "gport": self.gport,
            "relay": self.relay,
            "server": self.server,
            "source": self.source,
        }

    def _bind(self, server: Socket) -> Endpoint:
        address = self._owner.own_address(self)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for _ in range(PORT_TRIES):
            port = self._owner.next_port()
            try:
                server.bind((address, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                break
        else:
            port = 0
            server.bind((address, port))
        return Endpoint.of(address, port or server.getsockname()[1])

    def _another_port(self) -> None:
        # The former port stays registered until then, in case this ends before.
        self.server = self.source = None
        self._legs.drop_server()
        if self._tries % PORT_TRIES:
            self._begin_again()
        else:
            self.is_waiting_for_port = True
            self._legs.wait_in(self._owner.port_queue, self._begin_again)

    def _begin_again(self) -> None:
        if not self._legs.alive:
            return
        try:
            server = server_socket()
        except OSError as error:
            self._no_socket(error)
            return
        self.begin(server)

    def _no_socket(self, error: OSError) -> None:
        """There is none now, or none that can be bound; if that passes, it is waited for."""
        if error.errno in _PASSES:
            self.server = self.source = None
            self._legs.drop_server()
            self.is_waiting_for_port = True
            self._legs.wait_in(self._owner.port_queue, self._begin_again, error)
        else:
            self._refuse(f"no relay port: {in_words(error.errno)}")

    def _refuse(self, detail: str) -> None:
        self._legs.end(End.KILLED if self._legs.is_connected else End.REFUSED, detail)
