"""Links and routes: forwarding, what filters, the ways to the server, to a client, and back."""

from shlex import quote

from krelay.doctor import rulecheck
from krelay.doctor.facts import Facts, Path, Uplink
from krelay.doctor.findings import FAILED, OK, WARNING, Finding, not_tried

STRICT = 1
"""rp_filter: a packet must come by the link that leads back to its source (RFC 3704)."""


def forwarding(facts: Facts) -> list[Finding]:
    """UDP, TCP that is forwarded, and the clients' own connections to the server are forwarded by
    the kernel."""
    check, needed = "forwarding", bool(facts.config.forwarded)
    if facts.forwards is None:
        return [not_tried(check, "whether this host forwards isn't known")]
    if not facts.forwards:
        kinds = {"UDP" if s.proto == "udp" else "forwarded TCP" for s in facts.config.forwarded}
        text = "this host doesn't forward: " + (
            f"{' and '.join(sorted(kinds, reverse=True))} won't pass, "
            "nor the clients' own connections"
            if needed
            else "the clients' own connections to the server won't pass"
        )
        fix = "sysctl -w net.ipv4.ip_forward=1"
        return [Finding(check, FAILED if needed else WARNING, text, fix, safe=True)]
    ends = (facts.client_link, facts.server.link if facts.server else None)
    silent = [link.name for link in facts.links if link.name in ends and not link.forwards]
    if silent:
        fix = " && ".join(f"sysctl -w net/ipv4/conf/{name}/forwarding=1" for name in silent)
        text = f"what comes by {', '.join(silent)} isn't forwarded"
        return [Finding(check, FAILED if needed else WARNING, text, fix, safe=True)]
    return [Finding(check, OK, "this host forwards (net.ipv4.ip_forward=1)")]


def rp_filter(facts: Facts) -> list[Finding]:
    """The larger of all's and the link's is in force (ip-sysctl.rst)."""
    check = "rp_filter"
    strict = [
        link.name for link in facts.links if max(link.rp_filter, facts.rp_filter_all) == STRICT
    ]
    near = facts.client_link
    if not strict:
        return [Finding(check, OK, "not strict on any link")]
    shown = ", ".join(strict)
    fix = "sysctl -w net.ipv4.conf.all.rp_filter=2"
    if facts.rp_filtered:
        text = (
            f"strict on {shown}, and it has dropped {facts.rp_filtered} packets that came by "
            "another link than their answers would take"
        )
        return [Finding(check, WARNING, text, fix, safe=True)]
    if facts.client is not None and facts.client.link is None and facts.client.problem == "":
        text = (
            f"strict on {shown}: packets of {facts.client.to}, to which no route leads, are dropped"
        )
        return [Finding(check, FAILED, text, fix, safe=True)]
    way = f"; clients must come by {near}, as their answers do" if near in strict else ""
    return [Finding(check, OK, f"strict on {shown}, nothing dropped{way}")]


def vrf(facts: Facts) -> list[Finding]:
    """Addresses and routes of a VRF are in its own table, where no rule of ours looks."""
    check = "VRF"
    inside = [link for link in facts.links if link.vrf]
    if not inside:
        return [Finding(check, OK, "no link is in a VRF")]
    ends = [facts.client_link, facts.server.link if facts.server else None]
    if facts.client is not None and facts.client.link is None:
        ends = [None]  # the way to the client may be in any of them
    ours = [link for link in inside if None in ends or link.name in ends]
    if not ours:
        names = ", ".join(f"{link.name} ({link.vrf})" for link in inside)
        return [Finding(check, OK, f"clients and the server aren't in one; others are: {names}")]
    names = ", ".join(f"{link.name} in {link.vrf}" for link in ours)
    text = (
        f"{names}: addresses and routes of a VRF aren't krelay's to see, and nothing is relayed "
        "from it or to it; take the links out, or run krelay in a network namespace with them"
    )
    fix = " && ".join(f"ip link set {link.name} nomaster" for link in ours)
    return [Finding(check, FAILED, text, fix)]


def redirects(facts: Facts) -> list[Finding]:
    """A server that hears of another way to a client answers that client past the relay."""
    check, link = "redirects", facts.one_armed
    if link is None:
        text = "clients and the server aren't on one link, so this host sends no ICMP redirects"
        return [Finding(check, OK, text)]
    if not facts.redirects_leave:
        running = facts.served and facts.state == "running"
        text = "krelay's rules let out" if running else f"{link} sends"
        return [Finding(check, OK, f"{text} no ICMP redirects about the server's packets")]
    if facts.served:
        text = "as soon as it relays, krelay lets out no ICMP redirects about the server's packets"
        return [Finding(check, OK, text)]
    where = f"clients and the server are both by {link}"
    if facts.client is None:
        where = f"clients may come by {link}, where the server is"
    text = (
        f"{where}: until krelay relays, this host may tell the "
        "server by ICMP redirect of another way to a client, which the server keeps for minutes"
    )
    fix = " && ".join(f"sysctl -w net/ipv4/conf/{name}/send_redirects=0" for name in ("all", link))
    return [Finding(check, WARNING, text, fix, safe=True)]


def server(facts: Facts) -> list[Finding]:
    """A route to the real server, and a host at its end."""
    check, path = "server", facts.server
    if path is None:
        return [not_tried(check, "the way to it isn't known")]
    set_it = f"krelay set real_ip ADDRESS{facts.root_option}"
    if path.problem:
        return [Finding(check, FAILED, f"{path.to} can't be reached: {path.problem}", set_it)]
    if path.link is None:
        fix = f"ip route add {path.to} via GATEWAY"
        return [Finding(check, FAILED, f"there is no route to the server, {path.to}", fix)]
    by = f"by {path.link}" + (f" via {path.gateway}" if path.gateway else "")
    if path.silent:
        who = path.gateway or path.to
        text = f"{who} doesn't answer on {path.link}: is the server up, and is real_ip right?"
        return [Finding(check, WARNING, text, f"ip neigh flush to {who} dev {path.link}")]
    return [Finding(check, OK, f"{path.to} {by}")]


def uplinks(facts: Facts) -> list[Finding]:
    """The server's answers are routed before they get the address that the client asked."""
    check = "uplinks"
    if not facts.config.forwarded:
        return [
            Finding(check, OK, "nothing is forwarded, and the kernel routes what is terminated")
        ]
    findings = []
    for uplink in facts.uplinks:
        if _way(uplink.own) == _way(uplink.relayed):
            continue
        if uplink.mark is not None and rulecheck.marks_answers(facts):
            continue
        text = (
            f"answers to clients who ask {uplink.address} leave by {_way(uplink.relayed)}, where "
            f"the server's packets go, not by {_way(uplink.own)}, which a rule has for that address"
        )
        findings.append(Finding(check, WARNING, text, _mark(uplink)))
    if findings:
        return findings
    if facts.uplinks:
        return [Finding(check, OK, "answers leave by the uplink that was asked")]
    return [Finding(check, OK, "no rule chooses routes by this host's addresses")]


def _way(path: Path) -> str:
    return f"{path.link} via {path.gateway}" if path.gateway else str(path.link)


def _mark(uplink: Uplink) -> str:
    """A connection mark, of the uplink by which the first packet came, for the answers' routes."""
    mark = uplink.mark or uplink.free_mark
    came, first = f'iifname "{uplink.link}"', []
    if uplink.link == uplink.relayed.link:  # then the address tells, which is there before ours
        came = f"meta mark {mark}"
        first = [
            "add chain ip uplinks first { type filter hook prerouting priority -350; }",
            f"add rule ip uplinks first ip daddr {uplink.address} meta mark set {mark}",
        ]
    lines = (
        "add table ip uplinks",
        *first,
        "add chain ip uplinks pre { type filter hook prerouting priority mangle; }",
        f"add rule ip uplinks pre {came} ct state new ct mark set {mark}",
        *([f"add rule ip uplinks pre {came} meta mark set 0"] if first else []),
        f"add rule ip uplinks pre ct direction reply ct mark {mark} meta mark set {mark}",
    )
    chosen = f"ip rule add fwmark {mark} lookup {uplink.table}"
    return f"nft {quote('; '.join(lines))}" + ("" if uplink.mark else f" && {chosen}")


def client(facts: Facts) -> list[Finding]:
    """A route to the client."""
    check, path = "client", facts.client
    if path is None:
        link = facts.client_link
        where = f"by {link}" if link else "by any link"
        return [not_tried(check, f"none named (--client IP); clients are thought to come {where}")]
    if path.problem:
        return [Finding(check, FAILED, f"{path.to} can't be reached: {path.problem}")]
    if path.link is None:
        fix = f"ip route add {path.to} via GATEWAY"
        return [Finding(check, FAILED, f"there is no route to {path.to}", fix)]
    return [Finding(check, OK, f"{path.to} by {path.link}")]


def return_path(facts: Facts) -> list[Finding]:
    """The server's answers to a client must come back through here."""
    check, path = "return", facts.server
    if path is None or path.link is None:
        return [not_tried(check, "no way leads to the server")]
    here = path.source or "ADDRESS OF THE RELAY"
    if facts.config.source == "relay":
        return [Finding(check, OK, "source=relay: the server answers this host")]
    if facts.beside:
        text = "the client is in the server's subnet, so source=relay is used for it"
        return [Finding(check, OK, text)]
    if facts.client is None:
        text = "name a client with --client IP; the server must reach clients through "
        return [not_tried(check, f"{text}{here}")]
    seen = facts.returned
    if seen is None:
        if facts.redirects_leave:
            reason = "while krelay doesn't relay, it would bring an ICMP redirect about"
            return [not_tried(check, reason)]
        reason = facts.client.problem or "CAP_NET_RAW is wanting, without which nothing can be sent"
        return [not_tried(check, dict(facts.unseen).get("return", reason))]
    if seen.comes_back:
        return [Finding(check, OK, f"the server's answer to {facts.client.to} came back here")]
    if not seen.answers:
        text = f"{path.to} answers neither ICMP echo nor a TCP connection of ours: can't tell"
        return [Finding(check, WARNING, text)]
    text = (
        f"the server answers this host, but its answer to {facts.client.to} didn't come back: "
        f"on the server, `ip route replace {facts.client.to} via {here}`, or have it see the relay"
    )
    if facts.one_armed:
        text += "; an ICMP redirect, if it keeps one, goes by `ip route flush cache` there"
    return [Finding(check, FAILED, text, f"krelay set source relay{facts.root_option}")]


def gro(facts: Facts) -> list[Finding]:
    """Joined UDP packets of a new flow are lost before the queue (nfnetlink_queue.c; since kernel
    commit 7d8dc1c7be8d)."""
    findings = []
    for link in facts.links:
        if link.udp_gro:
            off = " ".join(f"{feature} off" for feature in link.udp_gro)
            text = (
                f"{link.name} joins UDP packets; the first of a new flow may be lost in the queue"
            )
            findings.append(Finding("UDP GRO", WARNING, text, f"ethtool -K {link.name} {off}"))
    return findings or [Finding("UDP GRO", OK, "off on every link")]
