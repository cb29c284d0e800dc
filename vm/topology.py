"""A network as data: hosts, the links between them, and everything that follows from the two.

Only hosts and links are written down.  Interface names, routes and kernel settings are derived, so
that they can't disagree, and a `Topology` that exists is one that can be built: all checks are made
when it is created.  Nothing here knows namespaces or virtual machines; whoever builds the network
asks for `wires`, `interfaces`, `routes` and `sysctls`.

    >>> print(draw(DEFAULT))
    client 10.0.0.1 ---- 10.0.0.254 relay 192.168.0.2 ---- 192.168.0.1 server
    <BLANKLINE>
    10.0.0.0/24
      client  eth0  10.0.0.1     gateway 10.0.0.254
      relay   eth0  10.0.0.254   forwards
    192.168.0.0/24
      relay   eth1  192.168.0.2  forwards
      server  eth0  192.168.0.1  gateway 192.168.0.2
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv6Interface,
    ip_address,
    ip_interface,
    ip_network,
)
from itertools import pairwise
from typing import Any, NamedTuple

HOST_NAME = re.compile(r"[a-z][a-z0-9-]{0,11}")
"""A switch's port is named `12-HOST`, an interface in 15 characters (IFNAMSIZ, linux/if.h)."""

SWITCH = "switch"
"""The namespace that holds the bridges of segments; no host may be called so."""

MTU = range(68, 65536)
"""Least: what IPv4 must carry unfragmented (RFC 791).  Most: veth's limit (drivers/net/veth.c)."""

Address = IPv4Interface | IPv6Interface


class TopologyError(ValueError):
    """A network that can't be built.  The text says what is wrong and what would be right."""


@dataclass(frozen=True, slots=True)
class Host:
    """A host; `gateway` is where its default route leads, one address for each family."""

    name: str
    forwards: bool = False
    gateway: str | None = None
    sysctls: Mapping[str, str | int] = field(default_factory=dict)
    """Kernel settings of its network: {"net.ipv4.conf.all.rp_filter": 0}."""


@dataclass(frozen=True, slots=True)
class Link:
    """A cable between two hosts.  An end is `HOST ADDRESS/LENGTH`, or several addresses."""

    a: str
    b: str
    mtu: int | None = None


@dataclass(frozen=True, slots=True, init=False)
class Segment:
    """A switch between hosts.  A member is `HOST ADDRESS`, or `HOST .N` within the subnet."""

    subnet: str
    members: tuple[str, ...]
    mtu: int | None

    def __init__(self, subnet: str, *members: str, mtu: int | None = None) -> None:
        object.__setattr__(self, "subnet", subnet)
        object.__setattr__(self, "members", members)
        object.__setattr__(self, "mtu", mtu)


class Interface(NamedTuple):
    """One end of a wire, as the host has it."""

    host: str
    name: str
    addresses: tuple[Address, ...]
    mtu: int | None

    @property
    def address(self) -> str:
        """The first address, as text."""
        return str(self.addresses[0].ip)


class Wire(NamedTuple):
    """What is built for a link or a segment: its ends, joined by a bridge if `switched`."""

    ends: tuple[Interface, ...]
    switched: bool

    @property
    def subnet(self) -> str:
        """The subnet of the first address."""
        return str(self.ends[0].addresses[0].network)


class Route(NamedTuple):
    """A route to `destination`, by way of the neighbour `via`."""

    destination: str
    via: str


@dataclass(frozen=True, slots=True)
class Topology:
    """Hosts and the links between them.  Raises TopologyError if they don't make a network."""

    hosts: tuple[Host, ...]
    links: tuple[Link | Segment, ...]
    wires: tuple[Wire, ...] = field(init=False, repr=False, compare=False)
    """What joins the hosts, in the order of the links; that is how eth0, eth1 are counted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "hosts", tuple(self.hosts))
        object.__setattr__(self, "links", tuple(self.links))
        _check_hosts(self.hosts)
        object.__setattr__(self, "wires", self._wires())
        _check_wires(self.wires)
        for host in self.hosts:
            _check_host(host, self.interfaces(host.name))

    @property
    def names(self) -> tuple[str, ...]:
        """The hosts' names, in order."""
        return tuple(host.name for host in self.hosts)

    def _wires(self) -> tuple[Wire, ...]:
        used = dict.fromkeys(self.names, 0)
        wires = []
        for link in self.links:
            ends = []
            for host, addresses in _ends(link):
                if host not in used:
                    raise TopologyError(f"no host {host!r}; there are {', '.join(used) or 'none'}")
                ends.append(Interface(host, f"eth{used[host]}", addresses, link.mtu))
                used[host] += 1
            wires.append(Wire(tuple(ends), isinstance(link, Segment)))
        return tuple(wires)

    def host(self, name: str) -> Host:
        """The host of that name.  Raises TopologyError if there is none."""
        for host in self.hosts:
            if host.name == name:
                return host
        raise TopologyError(f"no host {name!r}; there are {', '.join(self.names) or 'none'}")

    def interfaces(self, host: str) -> tuple[Interface, ...]:
        """The interfaces of a host, eth0 first."""
        self.host(host)
        return tuple(end for wire in self.wires for end in wire.ends if end.host == host)

    def interface(self, host: str, towards: str | None = None) -> Interface:
        """The host's first interface, or the one on the wire that it shares with `towards`."""
        self.host(host)
        for wire in self.wires:
            ends = {end.host: end for end in wire.ends}
            if host in ends and (towards is None or towards in ends):
                return ends[host]
        raise TopologyError(f"{host} has no link" + (f" to {towards}" if towards else ""))

    def routes(self, host: str) -> tuple[Route, ...]:
        """The routes of a host, but for those to its own subnets, which the kernel makes itself."""
        gateways = map(ip_address, (self.host(host).gateway or "").split())
        return tuple(Route("0.0.0.0/0" if g.version == 4 else "::/0", str(g)) for g in gateways)

    def sysctls(self, host: str) -> dict[str, str]:
        """Kernel settings by name: forwarding, quiet wires, then the host's own, which win.

        A host without IPv6 addresses gets none on its wires, not even link-local: router
        solicitations and multicast reports would be most of what a capture shows.
        """
        versions = {a.version for end in self.interfaces(host) for a in end.addresses}
        settings: dict[str, str] = {}
        if self.host(host).forwards:
            settings["net.ipv4.ip_forward"] = "1"
            if 6 in versions:
                settings["net.ipv6.conf.all.forwarding"] = "1"
        if 6 not in versions:
            settings["net.ipv6.conf.default.disable_ipv6"] = "1"
        return settings | {name: str(value) for name, value in self.host(host).sysctls.items()}


def _ends(link: Link | Segment) -> Iterator[tuple[str, tuple[Address, ...]]]:
    """The ends of a link: host and addresses.  Raises TopologyError for text that is neither."""
    texts = (link.a, link.b) if isinstance(link, Link) else link.members
    for text in texts:
        host, *addresses = text.split() or [""]
        if not addresses:
            raise TopologyError(f"{text!r} has no address; write 'HOST ADDRESS/LENGTH'")
        if isinstance(link, Segment):
            addresses = [_in_subnet(address, link.subnet) for address in addresses]
        elif bare := [a for a in addresses if "/" not in a]:
            raise TopologyError(f"{bare[0]} has no prefix length; write {bare[0]}/24")
        try:
            yield host, tuple(map(ip_interface, addresses))
        except ValueError as error:
            raise TopologyError(f"{text!r}: {error}") from None


def _in_subnet(address: str, subnet: str) -> str:
    """`.2` or `192.168.0.2` as an address of the subnet, with its prefix length."""
    try:
        network = ip_network(subnet)
        if address.startswith("."):
            tail = address[1:].split(".")
            address = ".".join([*str(network.network_address).split(".")[: -len(tail)], *tail])
        if "/" not in address:
            address = f"{address}/{network.prefixlen}"
        inside = ip_interface(address).network == network
    except ValueError as error:
        raise TopologyError(f"segment {subnet}: {error}") from None
    if not inside:
        raise TopologyError(f"{address} is not in segment {subnet}")
    return address


def _check_hosts(hosts: tuple[Host, ...]) -> None:
    seen: set[str] = set()
    for name in (host.name for host in hosts):
        if not HOST_NAME.fullmatch(name):
            raise TopologyError(
                f"{name!r} is not a host name: a-z, then up to 11 of a-z, 0-9 and hyphen"
            )
        if name == SWITCH or name in seen:
            raise TopologyError(f"host name {name!r} is taken")
        seen.add(name)


def _check_wires(wires: tuple[Wire, ...]) -> None:
    owner: dict[str, str] = {}
    for wire in wires:
        if len(wire.ends) < 2:
            raise TopologyError("a segment needs two members")
        subnets = {address.network for address in wire.ends[0].addresses}
        hosts: set[str] = set()
        for end in wire.ends:
            if end.host in hosts:
                raise TopologyError(f"{end.host} is on the link {wire.subnet} twice")
            hosts.add(end.host)
            if {address.network for address in end.addresses} != subnets:
                first = wire.ends[0]
                raise TopologyError(
                    f"{first.host} {first.addresses[0]} and {end.host} {end.addresses[0]} "
                    "share a link but not a subnet"
                )
            if end.mtu is not None and end.mtu not in MTU:
                raise TopologyError(f"mtu {end.mtu} is not in {MTU[0]}-{MTU[-1]}")
            for address in end.addresses:
                _check_address(end.host, address)
                taken = owner.setdefault(str(address.ip), end.host)
                if taken != end.host or list(end.addresses).count(address) > 1:
                    raise TopologyError(
                        f"{taken} and {end.host} have the same address {address.ip}"
                    )


def _check_address(host: str, address: Address) -> None:
    network = address.network
    ends = network.num_addresses > 2 and address.ip in (
        network.network_address,
        network.broadcast_address if isinstance(address.ip, IPv4Address) else None,
    )
    if ends or address.ip.is_multicast or address.ip.is_unspecified:
        raise TopologyError(f"{host} can't have {address}: it is not the address of one host")


def _check_host(host: Host, interfaces: tuple[Interface, ...]) -> None:
    addresses = [address for end in interfaces for address in end.addresses]
    networks = [address.network for address in addresses]
    for index, one in enumerate(networks):
        for other in networks[:index]:
            if one.version == other.version and one.overlaps(other):
                raise TopologyError(f"{host.name} has {other} and {one} on two links: they overlap")
    families = set()
    for text in (host.gateway or "").split():
        try:
            gateway = ip_address(text)
        except ValueError:
            raise TopologyError(f"{host.name}'s gateway {text!r} is not an address") from None
        if gateway in [address.ip for address in addresses]:
            raise TopologyError(f"{host.name}'s gateway {gateway} is its own address")
        if not any(gateway in network for network in networks):
            raise TopologyError(f"{host.name}'s gateway {gateway} is in none of its subnets")
        if gateway.version in families:
            raise TopologyError(f"{host.name} has two gateways of one family: {host.gateway}")
        families.add(gateway.version)
    for name in host.sysctls:
        # Anything outside net. is not the namespace's own: it would change the machine.
        if not re.fullmatch(r"net(\.[\w-]+)+", name):
            raise TopologyError(f"{host.name}: {name!r} is not a setting of a network: net.…")


def relay_topology(
    client_subnet: str = "10.0.0.0/24",
    server_subnet: str = "192.168.0.0/24",
    *,
    clients: int = 1,
    servers: int = 1,
    neighbours: int = 0,
    mtu: int | None = None,
    sysctls: Mapping[str, str | int] | None = None,
) -> Topology:
    """Clients -- relay -- servers, with other addresses or in greater number than DEFAULT.

    The hosts are client, client2 ..., relay, server, server2 ..., neighbour ...; a neighbour is a
    client in the servers' own subnet.  `mtu` is that of both sides, `sysctls` the relay's.  Raises
    TopologyError if the subnets are too small.
    """
    try:
        near, far = ip_network(client_subnet), ip_network(server_subnet)
        to_clients, to_servers = near[-2], far[2]
        fronts = [(name, near[n]) for n, name in _numbered("client", clients)]
        backs = [(name, far[n if n == 1 else n + 1]) for n, name in _numbered("server", servers)]
        backs += [(name, far[-1 - n]) for n, name in _numbered("neighbour", neighbours)]
    except (ValueError, IndexError) as error:
        raise TopologyError(f"{client_subnet}, {server_subnet}: {error}") from None
    return Topology(
        hosts=(
            *(Host(name, gateway=str(to_clients)) for name, _ in fronts),
            Host("relay", forwards=True, sysctls=sysctls or {}),
            *(Host(name, gateway=str(to_servers)) for name, _ in backs),
        ),
        links=(
            _side(near.prefixlen, str(near), [*fronts, ("relay", to_clients)], mtu),
            _side(far.prefixlen, str(far), [("relay", to_servers), *backs], mtu),
        ),
    )


def _numbered(name: str, count: int) -> list[tuple[int, str]]:
    return [(n, name if n == 1 else f"{name}{n}") for n in range(1, count + 1)]


def _side(
    length: int, subnet: str, members: list[tuple[str, Any]], mtu: int | None
) -> Link | Segment:
    """A cable for two, a switch for more."""
    if len(members) == 2:
        (a, address_a), (b, address_b) = members
        return Link(f"{a} {address_a}/{length}", f"{b} {address_b}/{length}", mtu=mtu)
    return Segment(subnet, *(f"{name} {address}" for name, address in members), mtu=mtu)


DEFAULT = relay_topology()
"""client 10.0.0.1 ---- 10.0.0.254 relay 192.168.0.2 ---- 192.168.0.1 server"""


def draw(topology: Topology) -> str:
    """The network for people: a line if it is a chain, then each subnet with its members."""
    chain = _chain(topology)
    paragraphs = [chain, ""] if chain else []
    wires = topology.wires
    ends = [end for wire in wires for end in wire.ends]
    addresses = {end: " ".join(str(address.ip) for address in end.addresses) for end in ends}
    host_width = max((len(end.host) for end in ends), default=0)
    name_width = max((len(end.name) for end in ends), default=0)
    width = max(map(len, addresses.values()), default=0)
    for wire in wires:
        mtu = wire.ends[0].mtu
        subnets = " ".join(str(address.network) for address in wire.ends[0].addresses)
        paragraphs.append(subnets + (f"  mtu {mtu}" if mtu else ""))
        for end in wire.ends:
            host = topology.host(end.host)
            role = (
                "forwards" if host.forwards else f"gateway {host.gateway}" if host.gateway else ""
            )
            where = f"  {end.host:{host_width}}  {end.name:{name_width}}  {addresses[end]:{width}}"
            paragraphs.append(f"{where}  {role}".rstrip())
    return "\n".join(paragraphs)


def _chain(topology: Topology) -> str:
    """The network on one line, or nothing if it isn't a chain in the order of its links."""
    wires = topology.wires
    if not wires or any(len(wire.ends) != 2 for wire in wires):
        return ""
    hosts = [wires[0].ends[0].host, *(wire.ends[1].host for wire in wires)]
    joined = all(left.ends[1].host == right.ends[0].host for left, right in pairwise(wires))
    if not joined or len(set(hosts)) != len(hosts):
        return ""
    line = hosts[0]
    for wire in wires:
        near, far = wire.ends
        line += f" {near.address} ---- {far.address} {far.host}"
    return line
