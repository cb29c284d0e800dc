"""Which DNS queries the kernel may relay without asking the worker first.  Pure.

A query begins a flow by itself where there is only one way to relay it: its client's address and
port are free towards the server, and the packet is as plain as they come.
"""

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import NamedTuple

from knet.endpoint import Endpoint, FlowKey, Proto, Source, flow_key
from knet.networks import collapse, network
from krelay.datapath.policy import Policy
from krelay.host.hostview import LOOPBACK
from krelay.nat.flow import DNS_PORT, Flow
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


def ends_of(flow: Flow) -> set[Endpoint]:
    """From where no query begins a flow while this one lives: its client's, and those by which the
    server knows it."""
    return {flow.client, *(FlowKey.unpack(key).src for key in flow.reserved)}


def released_by(flow: Flow, nat: NatTable) -> set[Endpoint]:
    """Those of these ends that are no longer minded when this flow goes."""
    if flow.proto is not Proto.UDP or flow.service.port != DNS_PORT:
        return set()
    return {end for end in ends_of(flow) if not _is_held(end, flow, nat)}


def _is_held(end: Endpoint, by_other_than: Flow, nat: NatTable) -> bool:
    """Whether another flow, or the client's own conversation, has this end."""
    at_server = flow_key(end, by_other_than.server)
    if (Proto.UDP, at_server) in nat.direct:
        return True
    if nat.mappings.holder(Proto.UDP, at_server) not in (None, by_other_than):
        return True
    for addr in nat.dns_flows.addresses:
        rewrite = nat.learning.of_query(flow_key(end, Endpoint(addr, DNS_PORT)))
        if rewrite is not None and rewrite.flow is not by_other_than:
            return True
    return False


def is_full(nat: NatTable, config: Config) -> bool:
    """Whether the table is full of confirmed flows: then the worker decides about each query."""
    return len(nat) - nat.admission.unconfirmed >= config.limits_flows


def traced_clients(filters: Sequence[Filter]) -> frozenset[bytes] | None:
    """The clients whose queries these admit; None: any client's."""
    queries = [each for each in filters if each.may_admit(Proto.UDP, DNS_PORT)]
    clients = [each.client_addr for each in queries if each.client_addr is not None]
    return frozenset(clients) if len(clients) == len(queries) else None
