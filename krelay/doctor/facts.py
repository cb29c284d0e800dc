"""What is known about the host: everything the checks look at, as values.

None stands for "couldn't be found out"; why stands in `problems`, a line each.
"""

from dataclasses import dataclass
from ipaddress import IPv4Address
from shlex import quote
from typing import NamedTuple

from krelay.doctor.firewall import Chains
from krelay.host.tracking import ConntrackTimers
from procfs_sim.tree import DEFAULT_ROOT, DEFAULTS, Config

LOOPBACK = "lo"
LASTING = ConntrackTimers()
"""Timers of connection tracking that are as long as krelay's own."""


class LinkFacts(NamedTuple):
    """A network interface that is up, but for the loopback."""

    name: str
    rp_filter: int = 0
    """Its own setting; in force is the larger of this and the one for `all`."""
    forwards: bool = True
    udp_gro: tuple[str, ...] = ()
    """Switched-on features that join UDP packets which this host forwards."""
    send_redirects: bool = False
    """Whether ICMP redirects are sent from it, by its own setting or the one for `all`."""
    vrf: str = ""
    """The VRF that it is in."""


class Path(NamedTuple):
    """Where packets to an address go."""

    to: IPv4Address
    link: str | None
    """None: there is no route."""
    source: IPv4Address | None = None
    gateway: IPv4Address | None = None
    problem: str = ""
    """Why there is none: unreachable, blackhole, prohibited; or that the address is our own."""
    silent: bool = False
    """The next hop doesn't answer ARP."""


class Uplink(NamedTuple):
    """An address of this host for which a rule chooses other routes (`ip rule from ADDRESS`)."""

    address: IPv4Address
    link: str
    """Where the address is."""
    table: int
    own: Path
    """The way of what this host sends to a client from that address."""
    relayed: Path
    """The way of the server's packets to that client, which get that address on their way out."""
    mark: int | None = None
    """With which a rule chooses the same routes, if one does."""
    free_mark: int = 1
    """One that no rule knows."""


class ListenerFacts(NamedTuple):
    """A socket of this host that clients, or tcp-relay, would meet."""

    proto: str
    address: IPv4Address | None
    """None: all addresses."""
    port: int
    program: str
    pid: int | None = None
    unit: str = ""
    """Its service unit, if it is one's."""


class Leftover(NamedTuple):
    """Rules of a krelay that is no more."""

    name: str
    tool: str
    """nft, iptables, ..."""
    queue: int | None


class Returned(NamedTuple):
    """What the probe of the server's return path saw."""

    answers: bool
    """The server answers this host."""
    comes_back: bool
    """Its answer to the client came back here."""


@dataclass(frozen=True, slots=True)
class Facts:
    """The host, as far as relaying is concerned.  The defaults are those of one in order."""

    root: str = DEFAULT_ROOT
    instance: str = "krelay"
    """The name of this tree's rules."""
    tree_exists: bool = True
    tree_fault: str = ""
    """Why the tree isn't trusted."""
    tree_fix: str = ""
    tree_state: str = "ok"
    """What a krelay that serves it says of the tree."""
    config: Config = DEFAULTS
    served: bool = False
    """A krelay is at work on this tree."""
    state: str | None = None
    """What it says of itself."""
    tcp_relays: int | None = None
    gateway: str = ""
    """What krelay says of its gateway port; empty if it isn't asked."""
    other_ports: tuple[int, ...] = ()
    """UDP services whose server has answered from other ports than it was asked at."""
    uid: int = 0
    net_admin: bool = True
    net_raw: bool = True
    missing_packages: tuple[str, ...] = ()
    has_queue: bool | None = True
    """The kernel knows the netfilter queue."""
    queue_num: int = 1600
    queue_taken: bool = False
    """By another program."""
    queue_lost: tuple[int, int] = (0, 0)
    """Packets dropped by the kernel: queue full, socket buffer full."""
    backend: str | None = "nft"
    """How rules can be made."""
    backend_problem: str = ""
    datapath: str = "kernel"
    """What would rewrite packets with `datapath` auto, as `krelay status` tells it."""
    tracked: tuple[int, int] | None = (0, 65536)
    """Entries of connection tracking, and how many there may be; None: there is no tracking."""
    timers: ConntrackTimers | None = LASTING
    """Connection tracking's."""
    forwards: bool | None = True
    rp_filter_all: int = 0
    rp_filtered: int = 0
    """Packets dropped by the reverse path filter since the host came up."""
    links: tuple[LinkFacts, ...] = ()
    own: frozenset[IPv4Address] = frozenset()
    server: Path | None = None
    beside: bool = False
    """The client is in the server's own subnet."""
    client: Path | None = None
    """None: no client was named."""
    default_link: str | None = None
    uplinks: tuple[Uplink, ...] = ()
    returned: Returned | None = None
    """None: not probed."""
    listeners: tuple[ListenerFacts, ...] = ()
    chains: Chains = ()
    """The host's packet filter, without krelay's own."""
    tools: frozenset[str] = frozenset()
    """Of ufw, firewall-cmd: what is installed."""
    port_range: tuple[int, int] = (32768, 60999)
    """First and last of the ports that programs get which ask for any (ip(7))."""
    reserved_ports: frozenset[int] = frozenset()
    """Those that no program gets that asks for any."""
    rmem_max: int | None = None
    buffer: int = 8 << 20
    """Bytes that krelay asks for the queue's socket."""
    buffer_is_granted: bool = True
    """Whether it gets them whatever rmem_max says; not in a user namespace."""
    files: int | None = 1 << 20
    """Descriptors that a process may have open (hard limit)."""
    leftovers: tuple[Leftover, ...] = ()
    stale_sockets: bool = False
    problems: tuple[tuple[str, str], ...] = ()
    """What couldn't be found out, and why."""
    unseen: tuple[tuple[str, str], ...] = ()
    """Parts that weren't looked at, and why; those of `problems` are among them."""
    conflict: str = ""
    """Why settings that are asked about don't go together."""

    @property
    def root_option(self) -> str:
        """What a `krelay` command needs to find the tree; empty for the usual one."""
        return "" if self.root == DEFAULT_ROOT else f" --root {quote(self.root)}"

    @property
    def one_armed(self) -> str | None:
        """The link by which clients come and the server is reached, if that may be the same."""
        link = self.server.link if self.server else None
        if self.client is not None:
            return link if self.client.link == link else None
        return link if self.client_link is None and self.default_link in (link, None) else None

    @property
    def redirects_leave(self) -> bool:
        """Whether this host would tell the server by ICMP redirect of another way to clients."""
        if self.served and self.state == "running":
            return False  # krelay's rules drop them
        return any(link.send_redirects for link in self.links if link.name == self.one_armed)

    @property
    def client_link(self) -> str | None:
        """The link that clients come by, as far as that can be told."""
        if self.client is not None:
            return self.client.link
        others = {link.name for link in self.links} - {self.server.link if self.server else None}
        if self.default_link in others:
            return self.default_link
        return others.pop() if len(others) == 1 else None
