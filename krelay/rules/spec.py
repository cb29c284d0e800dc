"""What is to be queued, as a value: equal specs make equal rules.  Names, queues and log groups.

Pure.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2s
from ipaddress import IPv4Address, IPv4Network

from knet.endpoint import Proto
from knet.rules.ports import Ports, merged
from knet.rules.rows import ANYONE
from krelay.nat.flow import Footprint

_BESIDE = 0x8000
"""By which the numbers of a krelay's second queue, and second log group, differ from the first."""


@dataclass(frozen=True, slots=True)
class RuleSpec:
    """What is to be queued.  Equal specs make equal rules."""

    name: str
    queue: int
    tcp: Ports
    udp: Ports
    gports: tuple[int, ...]
    servers: tuple[IPv4Address, ...]
    relay_clients: tuple[IPv4Network, ...]
    """Whose forwarded packets may need their source changed to the relay's (step U2)."""
    forwarded: Ports = ()
    """TCP that takes the steps of UDP; `tcp` is what tcp-relay terminates."""
    room: int = 0
    """Flows that may be offloaded; 0: every packet visits the worker."""
    lets_offloaded_pass: bool = False
    """Whether packets that the kernel's programs rewrite may leave at once (offloaded.py)."""
    learnt_to: IPv4Address | None = None
    """The server of queries that begin flows by themselves; None: none does."""
    any_port: Ports = ()
    """UDP whose servers may answer from any port; these are among `udp`, too."""
    asked_within: int = 0
    """Seconds for which the kernel knows which clients have asked these; 0: it doesn't (no set of
    nft's), and whatever UDP the servers send is queued."""
    tells_unmatched: bool = False
    """Whether of some of the servers' UDP that isn't relayed copies are made for krelay."""

    @property
    def services(self) -> Ports:
        """The ports of both protocols."""
        return merged([*self.tcp, *self.forwarded, *self.udp])

    @property
    def any_tcp(self) -> Ports:
        """The ports of TCP, however it is relayed."""
        return merged([*self.tcp, *self.forwarded])


def openings(queue: int) -> int:
    """The queue of the SYNs to services, beside that of everything else.

    So a flood of SYNs overflows a queue in which no other packet waits.
    """
    return queue ^ _BESIDE


def unmatched(queue: int) -> int:
    """The log group of the servers' datagrams that no rule asks for, beside the first."""
    return queue ^ _BESIDE


def instance_name(root: str, default_root: str) -> str:
    """The name of the chains of the krelay that serves this tree: two trees on a host get along."""
    if root == default_root:
        return "krelay"
    return "krelay-" + blake2s(root.encode(), digest_size=4).hexdigest()


_OURS = re.compile(r"(krelay(?:-[0-9a-f]{8})?)(?:-pre|-post)?")
_QUEUE = re.compile(r"queue(?: num| to|-num)? (\d+)")


def instance_of(name: str) -> str | None:
    """The instance that a table or chain of this name is of; None if it is none of krelay's.

    >>> instance_of("krelay-0badcafe-post"), instance_of("krelay"), instance_of("krelayed")
    ('krelay-0badcafe', 'krelay', None)
    """
    match = _OURS.fullmatch(name)
    return match[1] if match else None


def queue_of(text: str) -> int | None:
    """The queue that rules, as nft or iptables show them, send packets to."""
    match = _QUEUE.search(text)
    return int(match[1]) if match else None


def wanted(
    *,
    name: str,
    queue: int,
    tcp: Iterable[tuple[int, int]],
    udp: Iterable[tuple[int, int]],
    gport: int | None,
    server: IPv4Address,
    source_is_relay: bool,
    beside: Iterable[IPv4Network],
    footprints: Iterable[Footprint],
    forwarded: Iterable[tuple[int, int]] = (),
    room: int = 0,
    lets_offloaded_pass: bool = False,
    any_port: Iterable[tuple[int, int]] = (),
    asked_within: int = 0,
    tells_unmatched: bool = False,
) -> RuleSpec:
    """What new flows need, and what the flows that live still need.  No `gport`: none is needed."""
    live = list(footprints)

    def of(proto: Proto, *, through: bool = False) -> list[tuple[int, int]]:
        return [(f.port, f.port) for f in live if (f.proto, f.forwarded) == (proto, through)]

    elsewhere = merged([*any_port, *((f.port, f.port) for f in live if f.any_port)])
    anyone = source_is_relay or any(f.any_client for f in live)
    return RuleSpec(
        name=name,
        queue=queue,
        tcp=merged([*tcp, *of(Proto.TCP)]),
        udp=merged([*udp, *of(Proto.UDP)]),
        forwarded=merged([*forwarded, *of(Proto.TCP, through=True)]),
        gports=tuple(sorted({*([gport] if gport else []), *(f.gport for f in live if f.gport)})),
        servers=tuple(sorted({server, *(IPv4Address(f.server) for f in live)})),
        relay_clients=(ANYONE,) if anyone else tuple(sorted(set(beside))),
        room=room,
        lets_offloaded_pass=lets_offloaded_pass,
        learnt_to=server if lets_offloaded_pass else None,
        any_port=elsewhere,
        asked_within=asked_within if elsewhere else 0,
        tells_unmatched=tells_unmatched,
    )
