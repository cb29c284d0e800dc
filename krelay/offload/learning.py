"""Which DNS queries the kernel may relay without asking the worker first.  Pure.

A query begins a flow by itself where there is only one way to relay it: its client's address and
port are free towards the server, and the packet is as plain as they come.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from knet.endpoint import Proto, Source
from knet.networks import collapse, network
from krelay.datapath.policy import Policy
from krelay.host.hostview import LOOPBACK
from krelay.nat.flow import DNS_PORT
from krelay.nat.table import NatTable
from krelay.trace.lines import Filter
from procfs_sim.tree import Config

NO_CLIENTS = tuple(map(IPv4Network, ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3")))
"""Policy.may_be_client."""
MOST_ADDRESSES = 4096
"""Addresses of this host at which queries are learnt."""


class Learning(NamedTuple):
    """What the kernel relays by itself without asking first, and tells of (dnsflows.py)."""

    server: IPv4Address
    """Where queries go."""
    addresses: tuple[IPv4Address, ...]
    """Of this host, to which they come; MOST_ADDRESSES at most."""
    strangers: tuple[IPv4Network, ...]
    """Sources about whose queries the worker decides; none may be in another."""


def learning_for(
    config: Config, policy: Policy, traced: frozenset[bytes] | None
) -> Learning | None:
    """What the kernel may learn, but for the queries of clients that are `traced` (None: all).

    None where the worker has more to decide than the kernel can: a source to be changed, a rate to
    be kept, a trace to be shown.
    """
    if (
        policy.source is Source.RELAY
        or DNS_PORT not in policy.udp
        or DNS_PORT in policy.any_port
        or config.limits_new_flows_per_client
        or traced is None
    ):
        return None
    own = sorted(policy.own)
    addresses = [IPv4Address(each) for each in own if each[0] != LOOPBACK]
    if not addresses:  # the network isn't up yet
        return None
    others = [network(each) for each in (*own, *policy.backends, *traced)]
    others += [*policy.beside, *NO_CLIENTS]
    return Learning(config.real_ip, tuple(addresses[:MOST_ADDRESSES]), collapse(others))


def is_full(nat: NatTable, config: Config) -> bool:
    """Whether the table is full of confirmed flows: then the worker decides about each query."""
    return len(nat) - nat.admission.unconfirmed >= config.limits_flows


def traced_clients(filters: Sequence[Filter]) -> frozenset[bytes] | None:
    """The clients whose queries these admit; None: any client's."""
    queries = [each for each in filters if each.may_admit(Proto.UDP, DNS_PORT)]
    clients = [each.client_addr for each in queries if each.client_addr is not None]
    return frozenset(clients) if len(clients) == len(queries) else None
