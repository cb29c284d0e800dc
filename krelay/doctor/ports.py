"""Ports: who else listens, which are left for connections, what this host's own programs meet."""

from shlex import quote

from knet.rules.ports import merged
from krelay.doctor import rulecheck
from krelay.doctor.facts import Facts, ListenerFacts
from krelay.doctor.findings import FAILED, OK, WARNING, Finding

PORTS_WANTED = 1000
WIDE_RANGE = (20000, 65535)
"""Clear of the usual gateway port and of most services."""


def gateway_port(facts: Facts) -> list[Finding]:
    """No program but tcp-relay may listen there."""
    check, port = "gateway port", facts.config.gport
    if not facts.config.terminated:
        return [Finding(check, OK, "not used: no service needs tcp-relay")]
    taken = [one for one in facts.listeners if one.proto == "tcp" and one.port == port]
    if not taken and " is in use by " in facts.gateway:
        return [Finding(check, FAILED, f"{facts.gateway}: clients of TCP are refused", "")]
    if not taken:
        return [Finding(check, OK, f"{port} is free for tcp-relay, or tcp-relay's")]
    text = f"port {port} is in use by {_who(taken[0])}: clients would meet it instead of the server"
    return [Finding(check, FAILED, text, _stop(taken[0]), fatal=True)]


def services(facts: Facts) -> list[Finding]:
    """A server of this host on a relayed port is hidden while krelay relays."""
    findings = []
    for one in facts.listeners:
        if not facts.config.serves(one.proto, one.port):
            continue
        what = f"{one.proto}/{one.port}"
        if one.address is not None and one.address.is_loopback:
            continue  # no other host could reach it, and it goes on answering this host
        text = f"{_who(one)} serves {what} here: other hosts won't reach it while {what} is relayed"
        findings.append(Finding("services", WARNING, text, _stop(one)))
    if findings:
        return list(dict.fromkeys(findings))
    local = {one.program for one in facts.listeners if facts.config.serves(one.proto, one.port)}
    beside = f" (but {', '.join(sorted(local))}, on the loopback alone)" if local else ""
    return [Finding("services", OK, f"no server of this host is on a relayed port{beside}")]


def ports(facts: Facts) -> list[Finding]:
    """tcp-relay takes each connection's port towards the server from the host's own range."""
    check, (low, high) = "ports", facts.port_range
    if not facts.config.terminated:
        return []

    def left(first: int, last: int) -> int:
        return last + 1 - first - sum(first <= port <= last for port in facts.reserved_ports)

    if (found := left(low, high)) >= PORTS_WANTED:
        return [Finding(check, OK, f"{found} for connections to the server")]
    reserved = ", without ip_local_reserved_ports" if facts.reserved_ports else ""
    text = (
        f"{found} are left for connections to the server (net.ipv4.ip_local_port_range, {low} to "
        f"{high}{reserved}): tcp-relay, which looks when it starts, has no more at a time"
    )
    if left(*WIDE_RANGE) >= PORTS_WANTED:
        fix = f"sysctl -w net.ipv4.ip_local_port_range='{WIDE_RANGE[0]} {WIDE_RANGE[1]}'"
    else:
        fix = "sysctl -w net.ipv4.ip_local_reserved_ports="
    return [Finding(check, WARNING, text, fix)]


def own_ports(facts: Facts) -> list[Finding]:
    """Ports that the kernel gives this host's own programs shouldn't be a service's.

    Replies to such a program reach it all the same (ownflows.py), but each of them visits krelay.
    """
    check, (low, high) = "own ports", facts.port_range
    met = [
        service
        for service in facts.config.services
        if not facts.reserved_ports.issuperset(
            range(max(low, service.first), min(high, service.last) + 1)
        )
    ]
    if not met:
        text = f"no service lies among those of the host's own programs, {low} to {high}"
        return [Finding(check, OK, text)]
    wanted = {
        port
        for service in met
        for port in range(max(low, service.first), min(high, service.last) + 1)
    }
    reserved = facts.reserved_ports | wanted
    names = ", ".join(f"{s.proto}/{s.first}-{s.last}".removesuffix(f"-{s.first}") for s in met)
    text = (
        f"{names} lies among the ports that this host gives its own programs "
        f"(net.ipv4.ip_local_port_range, {low} to {high}): what these get back visits krelay"
    )
    if high + 1 - low - sum(low <= port <= high for port in reserved) < PORTS_WANTED:
        return [Finding(check, WARNING, f"{text}; relay fewer ports")]
    spans = merged((port, port) for port in reserved)
    listed = ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)
    fix = f"sysctl -w net.ipv4.ip_local_reserved_ports={listed}"
    return [Finding(check, WARNING, text, fix)]


def own_clients(facts: Facts) -> list[Finding]:
    """What this host sends to itself never leaves it, and no rule of ours looks at it."""
    check = "this host"
    if rulecheck.translates_own(facts):
        return [Finding(check, OK, "its own programs reach the services by its own rules")]
    spans = {
        proto: [
            f"{s.first}-{s.last}" if s.last > s.first else f"{s.first}"
            for s in facts.config.services
            if s.proto == proto
        ]
        for proto in ("tcp", "udp")
    }
    rules = [
        f"add rule ip own-clients out ip daddr != 127.0.0.0/8 fib daddr type local "
        f"{proto} dport {{ {', '.join(ports)} }} dnat to {facts.config.real_ip}"
        for proto, ports in spans.items()
        if ports
    ]
    lines = (
        "add table ip own-clients",
        "add chain ip own-clients out { type nat hook output priority -100; }",
        *rules,
    )
    text = (
        f"its own programs aren't relayed: let them ask {facts.config.real_ip} itself, or have "
        f"the kernel lead them there: nft {quote('; '.join(lines))}"
    )
    return [Finding(check, OK, text)]


def answers(facts: Facts) -> list[Finding]:
    """A server that answers from other ports (TFTP) is heard only where the service allows it."""
    check, config = "answers", facts.config
    at = [
        port
        for port in facts.other_ports
        if any(s.contains("udp", port) and not s.any_port for s in config.services)
    ]
    if not at:
        return [Finding(check, OK, "no server was seen to answer from another port than is asked")]
    text = (
        f"{', '.join(f'udp/{port}' for port in at)}: the server answers from other ports, which no "
        "client gets to see"
    )
    wanted = (
        s._replace(any_port=s.any_port or any(s.contains("udp", port) for port in at))
        for s in config.services
    )
    fix = f"krelay set services{facts.root_option} {quote(' '.join(map(str, wanted)))}"
    return [Finding(check, WARNING, text, fix)]


def _who(one: ListenerFacts) -> str:
    return one.program if one.pid is None else f"{one.program} (pid {one.pid})"


def _stop(one: ListenerFacts) -> str:
    if one.unit:
        return f"systemctl stop {quote(one.unit)}"
    return f"kill {one.pid}" if one.pid is not None else ""
