"""The command that lets by what is ours, and no more, by the tool that has made the rules."""

from krelay.doctor.facts import Facts
from krelay.doctor.firewall import (
    CONNTRACK_PRIORITY,
    Fate,
)
from krelay.doctor.passages import Ports, Stage

MULTIPORT_MOST = 15
"""Ports in one multiport match; a range counts twice (net/netfilter/xt_multiport.c)."""
_UFW_REACHED = ("ufw-user-", "ufw-after-", "ufw-reject-", "ufw-skip-to-policy-")
"""Chains of ufw that a packet enters with, or after, those of its users' rules."""
_FIRST_POLICY = -32768
"""The lowest priority that firewalld knows; users' own are mostly -1, the default."""


def command(facts: Facts, stage: Stage, fate: Fate, ports: tuple[Ports, ...]) -> str:
    """A command that lets by what is ours, and no more, ahead of what the chain has."""
    packet, base = stage.packet, fate.base
    server = facts.config.real_ip
    is_known = packet.reply and packet.tracked and packet.state != "new"
    stateful = is_known and base.priority > CONNTRACK_PRIORITY
    toward = "dport" if packet.dport is not None else "sport"
    host = ""
    if packet.dst == int(server):
        host = "d"
    elif packet.src == int(server):
        host = "s"
    if not packet.reply and packet.proto != "icmp" and packet.src != int(server):
        for by_tool in (_ufw, _firewalld):
            if found := by_tool(facts, stage, fate, ports):
                return found
    if packet.proto == "icmp":
        if base.tool == "nft":
            allowed = "icmp type destination-unreachable accept"
            return f"nft insert rule {base.family} {base.table} {base.name} {allowed}"
        table = "" if base.table == "filter" else f"-t {base.table} "
        allowed = "-p icmp --icmp-type destination-unreachable -j ACCEPT"
        return f"{base.tool} -w {table}-I {base.name} {allowed}"
    if base.tool == "nft":
        spans = ", ".join(span(pair, "-") for pair in ports)
        words = [f"ip {host}addr {server}"] if host else []
        one = len(ports) == 1
        words.append(
            f"{packet.proto} {toward} {spans}"
            if one
            else f"{packet.proto} {toward} '{{ {spans} }}'"
        )
        words += ["ct state established"] if stateful else []
        return f"nft insert rule {base.family} {base.table} {base.name} {' '.join(words)} accept"
    chain = base.name
    if any(c.tool == base.tool and c.name == "DOCKER-USER" for c in facts.chains):
        chain = "DOCKER-USER" if (base.table, chain) == ("filter", "FORWARD") else chain
    table = "" if base.table == "filter" else f"-t {base.table} "
    where = f"-{host} {server} " if host else ""
    state = " -m conntrack --ctstate ESTABLISHED" if stateful else ""
    commands = [
        f"{base.tool} -w {table}-I {chain} {where}-p {packet.proto} {match}{state} -j ACCEPT"
        for match in _iptables_ports(ports, toward)
    ]
    return " && ".join(commands)


def _ufw(facts: Facts, stage: Stage, fate: Fate, ports: tuple[Ports, ...]) -> str:
    """By ufw, which keeps it; empty where it can't say it.

    What is dropped before its users' rules have their say only iptables can let by.  `ufw allow`
    appends, but where there is a rule for the very same it only changes that one's verdict, and
    `prepend` leaves even that as it is; hence the three steps ahead of a user's rule.
    """
    base, packet = fate.base, stage.packet
    if base.tool == "nft" or "ufw" not in facts.tools:
        return ""
    if not any(c.tool == base.tool and c.name == "ufw-user-input" for c in facts.chains):
        return ""
    if fate.rule is not None and not fate.chain.name.startswith(_UFW_REACHED):
        return ""
    if packet.dst_local and packet.dport == facts.config.gport and base.hook == "input":
        route, what = "", "proto tcp to any"
    elif base.hook == "forward":
        route, what = "route ", f"proto {packet.proto} to {facts.config.real_ip}"
    elif base.hook == "output" and packet.dport is None:
        route, what = "", "out proto tcp from any"
    elif base.hook == "output":
        route, what = "", f"out proto tcp to {facts.config.real_ip}"
    else:
        return ""
    commands = []
    for group in _multiport(ports):
        rule = f"allow {what} port {','.join(group)}"
        commands.append(f"ufw {route}{rule}")
        if fate.rule is not None and fate.chain.name.startswith("ufw-user-"):
            commands += [f"ufw {route}delete {rule}", f"ufw {route}prepend {rule}"]
    return " && ".join(commands)


def _firewalld(facts: Facts, stage: Stage, fate: Fate, ports: tuple[Ports, ...]) -> str:
    """By firewalld, for good; empty where it can't say it.

    A port is added to its zone, unless a user's rule there, or a policy, comes first.  Everything
    else is a policy of our own, ahead of all others.
    """
    base, packet = fate.base, stage.packet
    if base.table != "firewalld" or "firewall-cmd" not in facts.tools:
        return ""
    to_gate = packet.dst_local and packet.dport == facts.config.gport
    if not (base.hook == "forward" or (base.hook == "input" and to_gate)):
        return ""
    ranges = [span(pair, "-") for pair in ports]
    zone = _zone(fate)
    if to_gate and zone is not None:
        added = " ".join(f"--add-port={span}/tcp" for span in ranges)
        return f"firewall-cmd --permanent {zone}{added} && firewall-cmd --reload"
    name = "krelay-in" if to_gate else "krelay"
    to = "" if to_gate else f"destination address={facts.config.real_ip} "
    rules = " ".join(
        f"--add-rich-rule='rule family=ipv4 {to}port port={span} protocol={packet.proto} accept'"
        for span in ranges
    )
    policy = f"firewall-cmd --permanent --policy={name}"
    return (
        f"firewall-cmd --permanent --new-policy={name}; "
        f"{policy} --add-ingress-zone=ANY; "
        f"{policy} --add-egress-zone={'HOST' if to_gate else 'ANY'}; "
        f"{policy} --set-priority={_FIRST_POLICY}; "
        f"{policy} {rules} && firewall-cmd --reload"
    )


def _zone(fate: Fate) -> str | None:
    """The zone in which a port is to be added, as an option, empty: the default one.

    None if what is added there comes too late.
    """
    name = fate.chain.name.removeprefix("filter_IN_")
    if name == fate.chain.name:
        return ""
    if name.startswith("policy_") or name.endswith(("_pre", "_deny")):
        return None
    for part in ("_log", "_allow", "_post"):
        name = name.removesuffix(part)
    return f"--zone={name} "


def _iptables_ports(ports: tuple[Ports, ...], toward: str) -> list[str]:
    if len(ports) == 1:
        return [f"--{toward} {span(ports[0], ':')}"]
    return [f"-m multiport --{toward}s {','.join(group)}" for group in _multiport(ports)]


def _multiport(ports: tuple[Ports, ...]) -> list[list[str]]:
    """As many groups as there must be, for iptables and for ufw, which is held to the same."""
    groups: list[list[str]] = [[]]
    room = MULTIPORT_MOST
    for low, high in ports:
        cost = 1 if low == high else 2
        if cost > room:
            groups.append([])
            room = MULTIPORT_MOST
        groups[-1].append(span((low, high), ":"))
        room -= cost
    return groups


def span(pair: Ports, between: str) -> str:
    low, high = pair
    return f"{low}" if low == high else f"{low}{between}{high}"
