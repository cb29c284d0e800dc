"""What new flows get, and what this host is: the rules' and the worker's common view."""

from dataclasses import dataclass, field
from ipaddress import IPv4Network

from knet.endpoint import Endpoint, Proto, Source
from knet.wire import ipv4


@dataclass(frozen=True, slots=True)
class Policy:
    """What new flows get, and what this host is."""

    gport: int
    served: frozenset[int]
    """Gateway ports where tcp-relays listen, so that no other program gets what is led there."""
    server: bytes
    """What new flows are led to; ask `backend_for` and `backends`."""
    source: Source
    tcp: frozenset[int]
    """Relayed ports."""
    udp: frozenset[int]
    own: frozenset[bytes]
    """Addresses of this host."""
    beside: tuple[IPv4Network, ...] = ()
    """Subnets on the link that leads to the server: a client there is answered directly by the
    server, past the relay."""
    towards: bytes | None = None
    """This host's address on that link."""
    mtu: int = ipv4.MAX_TOTAL
    """Bytes of the largest packet that this link takes."""
    forwarded: frozenset[int] = frozenset()
    """Those of `tcp` that take the steps of UDP."""
    any_port: frozenset[int] = frozenset()
    """Those of `udp` whose server may answer from any of its ports."""
    answers: bool = True
    """Whether clients refused for want of room get a RST or an ICMP error, or are dropped."""
    backends: frozenset[bytes] = field(init=False, repr=False, compare=False)
    """The addresses that `backend_for` can give."""
    _beside: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    """The same as numbers: mask and address."""

    def __post_init__(self) -> None:
        numbers = tuple((int(net.netmask), int(net.network_address)) for net in self.beside)
        object.__setattr__(self, "_beside", numbers)
        object.__setattr__(self, "backends", frozenset((self.server,)))

    def serves(self, proto: Proto, port: int) -> bool:
        """Whether new flows to this port of the relay are relayed."""
        return port in (self.tcp if proto is _TCP else self.udp)

    def backend_for(self, service: Endpoint, client: Endpoint) -> Endpoint:
        """The server that a new flow of this client to this service of the relay is led to.

        It is the same for all clients and services yet; its port is the service's.
        """
        return Endpoint(self.server, service.port)

    def may_be_client(self, addr: bytes) -> bool:
        """Whether a packet may come from there; the kernel drops others only behind PREROUTING.

        Not from this host itself, from no network at all, loopback, a group or broadcast (RFC 1812,
        section 5.3.7).
        """
        return addr[0] not in (0, 127) and addr[0] < 224 and addr not in self.own

    def source_for(self, client: bytes) -> Source:
        """Whose address the server must see, so that its answers come back through the relay."""
        if self.source is _RELAY or client in self.backends:
            return _RELAY
        number = int.from_bytes(client)
        for mask, net in self._beside:
            if number & mask == net:
                return _RELAY
        return self.source


_TCP, _RELAY = Proto.TCP, Source.RELAY
# By these names: looking one up in its class takes ten times as long.
