"""A network read from a file (TOML): hosts, and the links between them."""

import tomllib
from collections.abc import Mapping
from typing import Any

from krelay_vm.topology import Host, Link, Segment, Topology, TopologyError


def parse(text: str) -> Topology:
    """Reads a topology file (TOML).  Raises TopologyError.

    >>> small = parse('''
    ... [hosts]
    ... client = {gateway = "10.0.0.254"}
    ... relay = {forwards = true, sysctls = {"net.ipv4.conf.all.rp_filter" = 0}}
    ...
    ... [[links]]
    ... ends = ["client 10.0.0.1/24", "relay 10.0.0.254/24"]
    ... mtu = 1400
    ...
    ... [[links]]
    ... subnet = "192.168.0.0/24"
    ... members = ["relay .2", "client .9"]
    ... ''')
    >>> small.interface("client", towards="relay").mtu, small.routes("client")
    (1400, (Route(destination='0.0.0.0/0', via='10.0.0.254'),))
    """
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise TopologyError(f"not TOML: {error}") from None
    match tree:
        case {"hosts": dict(hosts), "links": list(links), **rest} if not rest:
            return Topology(
                tuple(_parse_host(name, fields) for name, fields in hosts.items()),
                tuple(map(_parse_link, links)),
            )
    raise TopologyError("a topology file has a table [hosts] and tables [[links]], nothing else")


def _parse_host(name: str, fields: object) -> Host:
    match fields:
        case dict() if fields.keys() <= {"forwards", "gateway", "sysctls"}:
            forwards, gateway = fields.get("forwards", False), fields.get("gateway")
            sysctls = fields.get("sysctls", {})
            match forwards, gateway, sysctls:
                case bool(), str() | None, dict() if all(
                    type(value) in (str, int) for value in sysctls.values()
                ):
                    return Host(name, forwards, gateway, sysctls)
    raise TopologyError(
        f"host {name} may have forwards = true, gateway = 'ADDRESS', sysctls = {{name = value}}"
    )


def _parse_link(fields: object) -> Link | Segment:
    match fields:
        case {"ends": [str(a), str(b)], **rest}:
            return Link(a, b, mtu=_parse_mtu(rest))
        case {"subnet": str(subnet), "members": list(members), **rest} if all(
            isinstance(member, str) for member in members
        ):
            return Segment(subnet, *members, mtu=_parse_mtu(rest))
    raise TopologyError(
        "a link has two ends = [...], or a subnet and members = [...]; mtu is optional"
    )


def _parse_mtu(rest: Mapping[Any, Any]) -> int | None:
    match rest:
        case {"mtu": int(mtu), **more} if not more and not isinstance(mtu, bool):
            return mtu
        case {**more} if not more:
            return None
    raise TopologyError(f"a link has no {', '.join(rest)} like this; mtu is a number")
