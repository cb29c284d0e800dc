"""What follows from a config: the policy of new flows, and the rules."""

from collections.abc import Iterable

from knet.endpoint import Source
from krelay.datapath.policy import Policy
from krelay.host.hostview import HostView
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import Footprint, Timeouts
from krelay.rules.spec import RuleSpec, wanted
from procfs_sim.tree import Config, Service


def limits(config: Config) -> FlowLimits:
    """How many flows there may be."""
    return FlowLimits(
        config.limits_flows, config.limits_flows_per_client, config.limits_new_flows_per_client
    )


def timeouts(config: Config) -> Timeouts:
    """When flows end that are idle."""
    return Timeouts(
        config.timeouts_udp,
        config.timeouts_udp_dns,
        config.timeouts_tcp_transitory,
        config.timeouts_tcp_established,
    )


def policy(config: Config, view: HostView, gport: int, served: frozenset[int]) -> Policy:
    """What new flows get; `gport`: their gateway port, `served`: where tcp-relays listen."""
    return Policy(
        gport=gport,
        served=served,
        server=config.real_ip.packed,
        source=Source(config.source),
        tcp=_ports(s for s in config.services if s.proto == "tcp"),
        udp=_ports(s for s in config.services if s.proto == "udp"),
        forwarded=_ports(s for s in config.services if s.forward),
        any_port=_ports(s for s in config.services if s.any_port),
        own=view.own,
        beside=view.beside,
        towards=view.towards,
        mtu=view.mtu,
        answers=config.limits_refusal == "reset",
    )


def rules(
    config: Config,
    view: HostView,
    gport: int,
    footprints: Iterable[Footprint],
    *,
    name: str,
    queue: int,
    room: int,
    has_maps: bool,
    tells_unmatched: bool,
) -> RuleSpec:
    """The rules for new flows and for those that live, whose `footprints` these are.

    `room`: how many flows can be offloaded in each step.  `has_maps`: what the
    packet filter can; `tells_unmatched`: what of it the worker can be told.
    """
    return wanted(
        name=name,
        queue=queue,
        tcp=((s.first, s.last) for s in config.terminated),
        udp=((s.first, s.last) for s in config.services if s.proto == "udp"),
        forwarded=((s.first, s.last) for s in config.services if s.forward),
        gport=gport if config.terminated else None,
        server=config.real_ip,
        source_is_relay=config.source == Source.RELAY,
        beside=view.beside,
        footprints=footprints,
        room=room,
        lets_offloaded_pass=has_maps,
        any_port=((s.first, s.last) for s in config.services if s.any_port),
        asked_within=config.timeouts_udp if has_maps else 0,
        tells_unmatched=tells_unmatched and has_maps,
    )


def _ports(services: Iterable[Service]) -> frozenset[int]:
    return frozenset(
        port for service in services for port in range(service.first, service.last + 1)
    )
