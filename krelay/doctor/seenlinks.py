"""Links, addresses, routes and rules that choose routes, over the routing socket; ethtool."""

import errno
import ipaddress
import itertools
import os
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Any

from krelay.doctor.facts import LOOPBACK, LinkFacts, Path, Uplink
from krelay.doctor.seen import SYS, Survey, number

NUD_FAILED = 0x20  # linux/neighbour.h
FAR_AWAY = IPv4Address("192.88.99.1")
"""Any host: an address to which no route of its own leads (RFC 7526)."""
OWN_TABLES = (253, 254, 255)
"""Those that each host has: default, main, local (linux/rtnetlink.h)."""
UDP_GRO = ("rx-udp-gro-forwarding", "rx-gro-list")


def links(seen: Survey) -> None:
    """The interfaces that are up, and this host's addresses."""
    from pyroute2 import IPRoute

    with IPRoute() as ip:
        found = ip.get_links()
        up = [
            message.get_attr("IFLA_IFNAME")
            for message in found
            if message["flags"] & 1 and not _is_vrf(message)  # IFF_UP (linux/if.h)
        ]
        own = {
            IPv4Address(address)
            for message in ip.get_addr(family=socket.AF_INET)
            if (address := message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
        }
    vrfs = _vrfs(found)
    links = [
        LinkFacts(
            name,
            rp_filter=number(SYS / "ipv4/conf" / name / "rp_filter"),
            forwards=bool(number(SYS / "ipv4/conf" / name / "forwarding")),
            send_redirects=any(
                number(SYS / "ipv4/conf" / each / "send_redirects") for each in ("all", name)
            ),
            vrf=vrfs.get(name, ""),
        )
        for name in up
        if name != LOOPBACK
    ]
    seen.add(links=tuple(links), own=frozenset(a for a in own if not a.is_loopback))


def routes(seen: Survey) -> None:
    """The ways to the server, to the client, to any host."""
    from pyroute2 import IPRoute

    config = seen.facts.config
    with IPRoute() as ip:
        names = {m["index"]: m.get_attr("IFLA_IFNAME") for m in ip.get_links()}
        silent = {
            (m["ifindex"], m.get_attr("NDA_DST"))
            for m in ip.get_neighbours(family=socket.AF_INET)
            if m["state"] & NUD_FAILED
        }
        server = _path(ip, config.real_ip, names, silent)
        client = _path(ip, seen.client, names, silent) if seen.client else None
        beside = False
        if seen.client and server.link:
            nets = [
                ipaddress.IPv4Network(f"{m.get_attr('IFA_ADDRESS')}/{m['prefixlen']}", strict=False)
                for m in ip.get_addr(family=socket.AF_INET)
                if names.get(m["index"]) == server.link
            ]
            beside = any(seen.client in net for net in nets) and any(
                config.real_ip in net for net in nets
            )
        default = _path(ip, FAR_AWAY, names, silent)
    seen.add(server=server, client=client, beside=beside, default_link=default.link)


def uplinks(seen: Survey) -> None:
    """Where rules have other routes for what this host sends from one of its addresses."""
    from pyroute2 import IPRoute

    server, link = seen.facts.config.real_ip, seen.facts.server and seen.facts.server.link
    if link is None:
        return
    client = seen.client or FAR_AWAY
    with IPRoute() as ip:
        names = {m["index"]: m.get_attr("IFLA_IFNAME") for m in ip.get_links()}
        indices = {name: index for index, name in names.items()}
        rules = ip.get_rules(family=socket.AF_INET)
        if not any(rule["src_len"] for rule in rules):
            return
        places = {
            IPv4Address(message.get_attr("IFA_LOCAL")): names[message["index"]]
            for message in ip.get_addr(family=socket.AF_INET)
        }
        relayed = _path(ip, client, names, set(), src=str(server), iif=indices[link])
        known = {rule.get_attr("FRA_FWMARK") for rule in rules}
        found = {}
        for rule in rules:
            table = _table(rule)
            if not rule["src_len"] or table in OWN_TABLES:
                continue
            net = ipaddress.IPv4Network(
                f"{rule.get_attr('FRA_SRC')}/{rule['src_len']}", strict=False
            )
            for address in places.keys() & seen.facts.own:
                if address in net and address not in found:
                    own = _path(ip, client, names, set(), src=str(address))
                    marks = (r.get_attr("FRA_FWMARK") for r in rules if _table(r) == table)
                    mark = next((each for each in marks if each), None)
                    free = next(n for n in itertools.count(table) if n not in known)
                    found[address] = Uplink(
                        address, places[address], table, own, relayed, mark, free
                    )
    seen.add(uplinks=tuple(found[address] for address in sorted(found)))


def gro(seen: Survey) -> None:
    """Which links join UDP packets (ethtool)."""
    from pyroute2.ethtool import Ethtool

    ethtool = Ethtool()
    try:
        links = []
        for link in seen.facts.links:
            try:
                features = ethtool.get_features(link.name).features
            except Exception:  # a link that has no such features, or is gone
                links.append(link)
                continue
            on = tuple(name for name in UDP_GRO if name in features and features[name].enable)
            links.append(link._replace(udp_gro=on))
    finally:
        ethtool.close()
    seen.add(links=tuple(links))


def _is_vrf(link: Any) -> bool:
    info = link.get_attr("IFLA_LINKINFO")
    return bool(info) and info.get_attr("IFLA_INFO_KIND") == "vrf"


def _vrfs(links: Iterable[Any]) -> dict[str, str]:
    """The VRF of each link that is in one."""
    names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in links if _is_vrf(link)}
    masters = ((link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_MASTER")) for link in links)
    return {name: names[master] for name, master in masters if master in names}


def _table(rule: Any) -> int:
    """The table in which a rule looks, whose number may be too large for the header."""
    return int(rule.get_attr("FRA_TABLE") or rule["table"])


def _path(
    ip: Any,
    to: IPv4Address,
    names: dict[int, str],
    silent: set[tuple[int, str]],
    **given: str | int,
) -> Path:
    """The kernel's answer to `ip route get`, `given` a source (src) and a link (iif)."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        (route,) = ip.route("get", dst=str(to), **given)
    except NetlinkError as error:
        if error.code == errno.ENETUNREACH:
            return Path(to, None)
        return Path(to, None, problem=os.strerror(error.code).lower())
    link = route.get_attr("RTA_OIF")
    gateway = route.get_attr("RTA_GATEWAY")
    source = route.get_attr("RTA_PREFSRC")
    own = route["type"] == 2  # RTN_LOCAL (linux/rtnetlink.h)
    return Path(
        to,
        names.get(link),
        IPv4Address(source) if source else None,
        IPv4Address(gateway) if gateway else None,
        "it is an address of this host" if own else "",
        (link, gateway or str(to)) in silent,
    )
