"""Which end is whose: what servers and tcp-relay see of each flow, and what a new flow gets.

Three kinds of port are chosen for flows, always the wanted one if it is free:

    inside   the client's port as tcp-relay sees it: two connections from C:x to K:80 and to
             K:443 would meet as C:x > K:A
    outside  the port the server sees: must differ from every other flow's and from the client's own
             direct connections to that server.  Of TCP that tcp-relay terminates it is tcp-relay's
             own, y; but a client below 1024 is seen below 1024, since a server may ask for that
             (RFC 4787, REQ-3a; NFS's `secure`)
    direct   when a client's own connection C:p > S:80 comes to a port p that the relay already uses
             towards S on its behalf, that connection is moved to another port (steps D1, D2)
"""

from collections.abc import Callable, Collection
from random import Random

from knet.endpoint import Endpoint, FlowKey, Proto, Source, flow_key
from krelay.nat.admission import Refusal
from krelay.nat.direct import DirectFlows
from krelay.nat.dnsflows import DnsFlows
from krelay.nat.flow import Flow
from krelay.nat.ports import FIRST_HIGH, RelayPorts

TRIES = 512
"""Ports of each parity that are looked at where the wanted one is taken: below 1024 all of them.
A client that has taken that many of its own in a row is refused; the packet path isn't held up."""


class PortTaken(Exception):
    """tcp-relay can't connect to the server from the port that it asked for."""

    def __init__(self) -> None:
        super().__init__("port_taken")


class Mappings:
    """The ends that flows have."""

    def __init__(self, direct: DirectFlows, dns_flows: DnsFlows, rng: Random) -> None:
        self.reserved: frozenset[int] = frozenset()
        """Ports of this host that no flow gets."""
        self._direct = direct
        self._dns_flows = dns_flows
        self._rng = rng
        self._relay_ports = {proto: RelayPorts(rng) for proto in Proto}
        self._outside: dict[Proto, dict[bytes, Flow]] = {proto: {} for proto in Proto}
        self._asked_by: dict[tuple[bytes, Endpoint], Flow] = {}
        """UDP whose server may answer from any port: the latest flow by the server's address and
        the end that it knows."""
        self._inside: dict[tuple[Endpoint, int], Flow] = {}
        self._by_relay: dict[Endpoint, Flow] = {}

    # Whose is it

    def holder(self, proto: Proto, outside: bytes) -> Flow | None:
        """The flow whose packets to the server read so there."""
        return self._outside[proto].get(outside)

    def is_free(self, proto: Proto, outside: bytes) -> bool:
        """Whether no flow's, and no client's own, packets to the server read so there."""
        return (
            outside not in self._outside[proto]
            and (proto, outside) not in self._direct
            and not (proto is _UDP and self._dns_flows.asked_as(outside) is not None)
        )

    def was_killed(self, proto: Proto, outside: Endpoint, server: Endpoint) -> bool:
        """Whether this is what the server sees of a forwarded flow that was killed."""
        flow = self.holder(proto, flow_key(outside, server))
        return flow is not None and flow.abort_asked and flow.is_forwarded

    def accepted(self, inside: Endpoint, gport: int) -> Flow | None:
        """The flow of a connection as tcp-relay sees it."""
        return self._inside.get((inside, gport))

    def of_relay_port(self, relay: Endpoint) -> Flow | None:
        """The TCP flow whose server leg begins at this port."""
        return self._by_relay.get(relay)

    def asked_by(self, server: bytes, client: Endpoint) -> Flow | None:
        """The latest flow of UDP whose server may answer from any port, by the server's address and
        the client's end that it knows."""
        return self._asked_by.get((server, client))

    # What flows take and give back

    def reserve(self, flow: Flow, outside: bytes) -> None:
        """This flow's packets to the server read so there."""
        self._outside[flow.proto][outside] = flow
        flow.reserved += (outside,)

    def take_inside(self, flow: Flow, inside: Endpoint, gport: int) -> None:
        """tcp-relay sees this flow's client so."""
        flow.inside, flow.gport = inside, gport
        self._inside[inside, gport] = flow

    def take_relay(self, flow: Flow, relay: Endpoint) -> None:
        """The server leg of this flow begins there."""
        flow.relay = relay
        self._by_relay[relay] = flow

    def take_relay_port(
        self,
        proto: Proto,
        client: Endpoint,
        hidden: bytes,
        server: Endpoint,
        not_of: Collection[int],
    ) -> int | None:
        """A port of the relay's address `hidden` for a flow with source=relay, if possible none of
        these.  None if none is free."""

        def is_free(port: int) -> bool:
            ends = (Endpoint(addr, port) for addr in (client.addr, hidden))
            return all(self.is_free(proto, flow_key(end, server)) for end in ends)

        def fits(port: int) -> bool:
            return port not in self.reserved and is_free(port)

        ports, wanted = self._relay_ports[proto], client.port
        port = ports.take(hidden, wanted, lambda p: p not in not_of and fits(p))
        return ports.take(hidden, wanted, fits) if port is None else port

    def share_relay(self, flow: Flow, relay: Endpoint) -> None:
        """This flow has the same port as another of the same client."""
        self._relay_ports[flow.proto].share(*relay)
        flow.relay = relay

    def asks_any_port(self, flow: Flow, outside: bytes) -> None:
        """The server of this flow may answer from any port."""
        self._asked_by[_known_by(outside)] = flow

    def give_outside_back(self, flow: Flow) -> None:
        """Others' packets may read as this flow's do at the server."""
        outside = self._outside[flow.proto]
        for each in flow.reserved:
            if outside.get(each) is flow:
                del outside[each]

    def _forget_any_port(self, flow: Flow) -> None:
        for each in flow.reserved:
            if self._asked_by.get(_known_by(each)) is flow:
                del self._asked_by[_known_by(each)]

    def give_relay_back(self, flow: Flow) -> None:
        """The flow has no port of tcp-relay's towards the server any more."""
        if flow.relay is not None and self._by_relay.get(flow.relay) is flow:
            del self._by_relay[flow.relay]

    def give_back(self, flow: Flow) -> None:
        """The flow has ended."""
        # As give_outside_back and give_relay_back: calls would cost a good part of it.
        outside, gport, relay = self._outside[flow.proto], flow.gport, flow.relay
        for each in flow.reserved:
            if outside.get(each) is flow:
                del outside[each]
        if self._asked_by and flow.is_any_port:
            self._forget_any_port(flow)
        if gport is None:
            if relay is not None:
                self._relay_ports[flow.proto].give_back(*relay)
            return
        if flow.inside is not None:
            inside = flow.inside, gport
            if self._inside.get(inside) is flow:
                del self._inside[inside]
        if relay is not None and self._by_relay.get(relay) is flow:
            del self._by_relay[relay]

    # What a new flow gets

    def inside_for(self, client: Endpoint, gport: int, service: Endpoint) -> Endpoint:
        """The client as tcp-relay will see it.  Raises Refusal (`no_port`)."""
        if self._inside_is_free(client, gport, service):
            return client
        port = self._other_port(
            client.port, lambda p: self._inside_is_free(Endpoint(client.addr, p), gport, service)
        )
        return Endpoint(client.addr, port)

    def outside_for(self, proto: Proto, client: Endpoint, server: Endpoint) -> bytes:
        """What packets to the server are to read there, if it sees the client's address.

        Raises Refusal (`no_port`).
        """
        outside = flow_key(client, server)
        if not self.is_free(proto, outside):
            port = self._other_port(
                client.port,
                lambda p: self.is_free(proto, flow_key(Endpoint(client.addr, p), server)),
            )
            outside = flow_key(Endpoint(client.addr, port), server)
        return outside

    def low_outside_for(self, flow: Flow, outside: Endpoint, services: Collection[int]) -> Endpoint:
        """How the server sees a client below 1024: from its own port where that is free.

        As `outside`, from above, where no port below is free.
        """
        of_relay = flow.source is Source.RELAY

        def is_free(port: int) -> bool:
            key = flow_key(outside._replace(port=port), flow.server)
            mine = self.holder(_TCP, key) is flow and (_TCP, key) not in self._direct
            if of_relay and (port in self.reserved or port in services):
                return False
            return mine or self.is_free(_TCP, key)

        port = flow.client.port
        if not is_free(port):
            try:
                port = self._other_port(port, is_free)
            except Refusal:
                return outside
        return outside._replace(port=port)

    def _inside_is_free(self, inside: Endpoint, gport: int, service: Endpoint) -> bool:
        """Whether tcp-relay's host takes a new connection from there for a new one.

        While it remembers a closed one between the same ports (TIME_WAIT), it does if the client's
        numbers go on where they ended, which is so only towards the same service (RFC 6528).
        """
        flow = self._inside.get((inside, gport))
        return flow is None or (flow.closed_at is not None and flow.service == service)

    def _other_port(self, wanted: int, is_free: Callable[[int], bool]) -> int:
        """Another than the wanted port, of its class (below 1024 or not), if possible its parity.

        RFC 4787, REQ-3a and REQ-4.  Raises Refusal (`no_port`).
        """
        low, high = (1, FIRST_HIGH - 1) if wanted < FIRST_HIGH else (FIRST_HIGH, 0xFFFF)
        start, ports = self._rng.randint(low, high), high - low + 1
        for parity in (wanted % 2, 1 - wanted % 2):
            for step in range(min(ports, 2 * TRIES)):
                port = low + (start + step - low) % ports
                if port % 2 == parity and is_free(port):
                    return port
        raise Refusal("no_port")


def _known_by(outside: bytes) -> tuple[bytes, Endpoint]:
    """Of what a server is sent: its address, and the end that it knows."""
    key = FlowKey.unpack(outside)
    return key.dst.addr, key.src


_TCP, _UDP = Proto.TCP, Proto.UDP
# By these names: looking one up in its class takes ten times as long.
