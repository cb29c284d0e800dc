"""All relayed connections, and their talk with krelay.

Connections are found by their relay port, which is what krelay names them by, and while something
is asked by the number of the message.  A krelay that was restarted, or is a new one, has lost both
its flows and our questions: after a reconnect each connection says where it stands, those with a
server by `resume`, the others by asking again.

Relay ports are chosen here and not by the kernel, and bound by their number with SO_REUSEADDR.  So
krelay knows the port before the SYN leaves; ports may be shared by connections to several servers;
and one in TIME_WAIT serves again.  `bind` to port 0 passes over these even so
(inet_csk_find_open_port), and searches for milliseconds as they become many.  `connect` then tells
whether the four addresses together are free: in TIME_WAIT they are if timestamps tell old segments
from new (RFC 6191; tcp_twsk_unique, for a port that was bound, whatever tcp_tw_reuse says).  All of
them are taken in turn, in an order drawn by lot at the start: the same one comes again as late as
can be, and the order can't be foreseen (RFC 6056).
"""

import itertools
import os
import socket
from array import array
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from knet import localports
from knet.endpoint import Endpoint
from knet.log import Log, Throttle
from krelay.registration.messages import (
    Abort,
    Answer,
    BadMessage,
    Close,
    Listening,
    Marked,
    NotListening,
    Open,
    Opened,
    Refused,
    Report,
    Resume,
    Resumed,
)
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.legs import Legs
from tcp_relay.engine.portqueue import PortWaitQueue
from tcp_relay.engine.session import End
from tcp_relay.engine.sockets import HOST_FAILS, Socket, own_address
from tcp_relay.engine.timeouts import FixedTimeoutQueue
from tcp_relay.relay.connection import Connection
from tcp_relay.relay.link import RelayLink

ASK_TIMEOUT = 5.0
"""Seconds that a client waits for krelay's answer; krelay may be restarting."""

ROUTE_AGE = 0.01
"""Seconds that the own address is remembered: to ask takes as long as some other system calls, and
a connection from an address that is no more waits in vain."""

HAND_OVER_AGAIN = 1.0
"""Seconds after which a listening socket that krelay refused is handed over once more."""

MEND = "net.ipv4.tcp_timestamps=1, here and at the server; or widen net.ipv4.ip_local_port_range"
"""Against a lack of relay ports."""

log = Log("relay")


class Relay:
    """Opens connections and keeps those that have a relay port.

    `share`: which part of the relay ports is used here, as (index, of how many), so that several
    processes don't try the same ones.  `keeps_dscp`: see Connection.marked.
    """

    def __init__(
        self,
        engine: Engine,
        relay_socket: Path,
        share: tuple[int, int] = (0, 1),
        keeps_dscp: bool = True,
    ) -> None:
        self.keeps_dscp = keeps_dscp
        self.real_ip: str | None = None
        """Towards which the own address is chosen."""
        self._engine = engine
        self._loop = loop = engine.loop
        self.asked: FixedTimeoutQueue[Legs] = FixedTimeoutQueue(loop, ASK_TIMEOUT, _not_answered)
        self.port_queue = PortWaitQueue(loop, MEND)
        self._by_relay: dict[Endpoint, Connection] = {}
        self._by_id: dict[int, Connection] = {}
        self._ids = itertools.count(1)
        self._route: tuple[str | None, float, str | None] = (None, 0.0, None)
        self._complaints = Throttle()
        self._ports = _shuffled(_own_ports(*share))
        self._next_port = 0
        self._last_report: Report | None = None
        self._listening: dict[int, Socket] = {}
        """By gateway port."""
        self._handed: dict[int, int] = {}
        """The gateway port by the number of the message that handed its socket over."""
        self._link = RelayLink(loop, relay_socket, self)

    def __len__(self) -> int:
        return len(self._by_relay)

    def accepted(self, gport: int, client: Socket, server: Socket, peer: tuple[Any, ...]) -> None:
        """A client is at that gateway port, and an unused socket for its server leg there.

        Takes over both.
        """
        Connection(self._engine, self, gport, client, peer).begin(server)

    def listening(self, port: int, sock: Socket) -> None:
        """Hands this listening socket over to krelay, now and after each reconnect."""
        self._listening[port] = sock
        self._hand_over(port)

    def not_listening(self, port: int) -> None:
        """The socket of this gateway port will be closed."""
        if self._listening.pop(port, None) is not None:
            self._link.send(NotListening(port))

    def report(self, report: Report) -> None:
        """Tells krelay the counters, now and after each reconnect."""
        self._last_report = report
        self._link.send(report)

    def close(self) -> None:
        """Closes the link."""
        self._link.close()

    # What connections ask.

    def own_address(self, connection: Connection) -> str:
        """The address that the kernel would use towards the server.

        Without a route to it, the one that the client came to: `connect` will say what is wrong.
        """
        real_ip, until, address = self._route
        if real_ip != self.real_ip or self._loop.now >= until:
            with suppress(_Unknown):  # then the last answer serves
                address = _own_address(self.real_ip) if self.real_ip else None
            self._route = (self.real_ip, self._loop.now + ROUTE_AGE, address)
        return address or connection.host

    def forget_address(self) -> None:
        """It is asked for again."""
        self._route = (None, 0.0, self._route[2])

    def next_port(self) -> int:
        """A relay port to try."""
        self._next_port = (self._next_port + 1) % len(self._ports)
        return self._ports[self._next_port]

    def register(self, connection: Connection) -> bool:
        """Asks krelay; False if the port is registered already."""
        assert connection.relay is not None
        if self._by_relay.setdefault(connection.relay, connection) is not connection:
            return False
        if self._link.is_up:
            self._ask(connection)
        return True

    def unregister(self, connection: Connection, tell: bool) -> None:
        """Forgets its relay port and the message about it."""
        self._by_id.pop(connection.message_id, None)
        relay = connection.relay
        if relay is not None and self._by_relay.get(relay) is connection:
            del self._by_relay[relay]
            if tell:
                self._link.send(Close(relay))

    # What the link tells.

    def link_up(self) -> None:
        """Tells krelay the gateway ports in use, and of each connection where it stands."""
        for port in self._listening:
            self._hand_over(port)
        for connection in list(self._by_relay.values()):
            if not connection.is_waiting_for_port:
                self._ask(connection)
        if self._last_report is not None:
            self._link.send(self._last_report)

    def link_down(self) -> None:
        """No message will be answered any more."""
        self._by_id.clear()
        self._handed.clear()

    def answered(self, answer: Answer) -> None:
        """Hands it to the connection it is about, if that hasn't ended since."""
        match answer:  # in the order of how often they come
            case Opened(id=number):
                if connection := self._by_id.pop(number, None):
                    if connection.server is not None:
                        raise BadMessage(f"message {number} was no open")
                    connection.opened(answer)
            case Abort(relay=relay):
                if connection := self._by_relay.get(relay):
                    connection.abort(End.KILLED, "krelay ended it")
            case Refused(id=None, error=error):
                if (suppressed := self._complaints.admit(self._loop.now)) is not None:
                    log.error(
                        "krelay refused a message", error=error, suppressed=suppressed or None
                    )
            case Refused(id=int(number), error=error):
                if connection := self._by_id.pop(number, None):
                    connection.refused(answer)
                elif (port := self._handed.pop(number, None)) is not None:
                    self._not_taken(port, error)
            case Resumed(id=number):
                if connection := self._by_id.pop(number, None):
                    if connection.server is None:
                        raise BadMessage(f"message {number} was no resume")
                    connection.marked(answer.dscp)
            case Marked(relay=relay):
                if connection := self._by_relay.get(relay):
                    connection.marked(answer.dscp)

    def _hand_over(self, port: int) -> None:
        sock = self._listening.get(port)
        if sock is None or not self._link.is_up:
            return
        for number in [number for number, other in self._handed.items() if other == port]:
            del self._handed[number]
        number = next(self._ids)
        self._handed[number] = port
        self._link.send_with(Listening(port, number), sock)

    def _not_taken(self, port: int, error: str) -> None:
        """krelay leads no client there; it may have had no descriptor left."""
        if (suppressed := self._complaints.admit(self._loop.now)) is not None:
            log.warning(
                "krelay refused the listening socket",
                gport=port,
                error=error,
                suppressed=suppressed or None,
            )
        self._loop.call_at(self._loop.now + HAND_OVER_AGAIN, partial(self._hand_over, port))

    def _ask(self, connection: Connection) -> None:
        number = connection.message_id = next(self._ids)
        self._by_id[number] = connection
        client, gport, relay = connection.client, connection.gport, connection.relay
        assert relay is not None
        if connection.server is None:
            self._link.send(Open(number, client, gport, relay))
        else:
            self._link.send(
                Resume(
                    number,
                    client,
                    gport,
                    relay,
                    connection.server,
                    connection.service,
                    connection.source,
                    connection.origin,
                    connection.seen,
                )
            )


def _not_answered(legs: Legs) -> None:
    legs.end(End.REFUSED, "krelay doesn't answer")


class _Unknown(Exception):
    """The kernel can't tell now."""


def _own_address(real_ip: str) -> str | None:
    """None if there is no route.  Raises _Unknown."""
    try:
        return own_address(socket.AF_INET, (real_ip, 9))
    except OSError as error:
        if error.errno in HOST_FAILS:
            raise _Unknown from None
        return None


def _shuffled(chosen: Sequence[int]) -> "array[int]":
    """By lot, from one read of the kernel's random bytes; two bytes each."""
    lots = iter(array("I", os.urandom(4 * len(chosen))))
    # Numbers of 30 bits are compared faster.
    return array("H", sorted(chosen, key=lambda _: next(lots) >> 2))


def _own_ports(index: int, of: int) -> Sequence[int]:
    """A share of the ports that this host uses for connections of its own.

    ip(7), ip_local_port_range, without ip_local_reserved_ports.
    """
    share = _own_range(index, of)
    try:
        reserved = localports.reserved(Path(localports.RESERVED).read_text())
    except (OSError, ValueError):
        return share
    return [port for port in share if port not in reserved] or share


def _own_range(index: int, of: int) -> range:
    try:
        low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    except (OSError, ValueError):
        low, high = 32768, 60999
    count = high + 1 - low
    return range(low + index * count // of, low + (index + 1) * count // of) or range(low, high + 1)
