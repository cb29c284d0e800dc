"""Our packets as the host's own rules see them, and what becomes of them there.

Rewriting is done before connection tracking for packets that come, and after the host's rules for
packets that go (ruleset).  So between the two the host sees complete and ordinary conversations:

    T1  C:x > K:A    comes in    new              T2  K:A > C:x    goes out    established
    T3  K:y > S:80   goes out    new              T4  S:80 > K:y   comes in    established
    U1  C:x > S:53   forwarded   new              U3  S:53 > C:x   forwarded   established
                     (and TCP that is written =forward; where the server answers from another
                     port, `+any-port`, that is new, too)

and before ours, in chains of a priority that is no later than raw, the packets as they were sent.
"""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from krelay.doctor.facts import Facts
from krelay.doctor.findings import Finding, Level
from krelay.doctor.firewall import (
    CONNTRACK_PRIORITY,
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    Chain,
    Fate,
    Packet,
    judge,
)

RAW_PRIORITY = -300
EVERYTHING = (HIGHEST_PRIORITY - 1, LOWEST_PRIORITY)
BEFORE_OURS = (HIGHEST_PRIORITY - 1, RAW_PRIORITY)
AFTER_OURS = (RAW_PRIORITY, LOWEST_PRIORITY)
EPHEMERAL = (1024, 65535)
"""Ports from which servers answer that were asked at another (RFC 6056, section 3.2)."""
MULTIPORT_MOST = 15
"""Ports in one multiport match; a range counts twice (net/netfilter/xt_multiport.c)."""

CHECK = "firewall"
OWN = "kill or refusal"
"""The step of what krelay itself sends."""
NO_PORTS = (0, 0)
"""ICMP has none."""
LEAVING = ("output", "postrouting")
_UFW_REACHED = ("ufw-user-", "ufw-after-", "ufw-reject-", "ufw-skip-to-policy-")
"""Chains of ufw that a packet enters with, or after, those of its users' rules."""
_FIRST_POLICY = -32768
"""The lowest priority that firewalld knows; users' own are mostly -1, the default."""
Ports = tuple[int, int]


class Stage(NamedTuple):
    """A hook, and what of ours it sees."""

    hook: str
    packet: Packet
    ports: Ports
    """First and last of the service, or the gateway port twice."""
    where: str
    """From or to whom, for people."""
    priorities: tuple[int, int] = EVERYTHING


class Passage(NamedTuple):
    """The way of one kind of packets through the host."""

    step: str
    stages: tuple[Stage, ...]


def passages(facts: Facts) -> Iterator[Passage]:
    """Everything of ours that the host's rules get to see."""
    config = facts.config
    server = int(config.real_ip)
    client = int(facts.client.to) if facts.client else None
    near = facts.client_link
    far = facts.server.link if facts.server else None
    ours = int(next(iter(facts.own))) if len(facts.own) == 1 else None
    gate = (config.gport, config.gport)
    links = tuple(link.name for link in facts.links)

    def comes(packet: Packet, ports: Ports, where: str) -> tuple[Stage, Stage]:
        return (
            Stage("ingress", packet, ports, where),
            Stage("prerouting", packet, ports, where, BEFORE_OURS),
        )

    for service in config.services:
        proto, ports = service.proto, (service.first, service.last)
        asked = Packet(proto, client, None, ours, ports[0], near, "", dst_local=True, links=links)
        if proto == "tcp" and not service.forward:
            t1 = asked._replace(dport=config.gport)
            yield Passage(
                "T1",
                (
                    *comes(asked, ports, "from clients"),
                    Stage("prerouting", t1, gate, "from clients", AFTER_OURS),
                    Stage("input", t1, gate, "from clients"),
                ),
            )
            t2 = Packet(
                "tcp", ours, config.gport, client, None, "", near, True, reply=True, links=links
            )
            yield Passage("T2", tuple(Stage(hook, t2, gate, "to clients") for hook in LEAVING))
            t3 = Packet("tcp", ours, None, server, ports[0], "", far, src_local=True, links=links)
            yield Passage("T3", tuple(Stage(hook, t3, ports, "to the server") for hook in LEAVING))
            answer = Packet("tcp", server, ports[0], client, None, far, "", reply=True, links=links)
            t4 = answer._replace(dst=ours, dst_local=True)
            yield Passage(
                "T4",
                (
                    *comes(answer, ports, "from the server"),
                    Stage("prerouting", t4, ports, "from the server", AFTER_OURS),
                    Stage("input", t4, ports, "from the server"),
                ),
            )
        else:
            u1 = Packet(proto, client, None, server, ports[0], near, far, links=links)
            yield Passage(
                "U1",
                (
                    *comes(asked, ports, "from clients"),
                    Stage("prerouting", u1._replace(oif=""), ports, "from clients", AFTER_OURS),
                    Stage("forward", u1, ports, "to the server"),
                    Stage("postrouting", u1, ports, "to the server"),
                ),
            )
            u3 = Packet(proto, server, ports[0], client, None, far, near, reply=True, links=links)
            yield Passage(
                "U3",
                (
                    *comes(u3._replace(oif=""), ports, "from the server"),
                    Stage("prerouting", u3._replace(oif=""), ports, "from the server", AFTER_OURS),
                    Stage("forward", u3, ports, "to clients"),
                    Stage("postrouting", u3, ports, "to clients"),
                ),
            )
            if service.any_port:
                begins = u3._replace(sport=EPHEMERAL[0], reply=False)
                stage = Stage("forward", begins, EPHEMERAL, "to clients")
                yield Passage("U3", (stage,))


def own_packets(facts: Facts) -> Iterator[Passage]:
    """What krelay itself sends, by a raw socket: to who is refused, and to both ends of a forwarded
    connection that is killed.

    Connection tracking knows none of these but those to a server that sees its client; a SYN, by
    which a killed end is made to speak, it takes for a new connection.
    """
    config = facts.config
    server, client = int(config.real_ip), int(facts.client.to) if facts.client else None
    ours = int(next(iter(facts.own))) if len(facts.own) == 1 else None
    near, far = facts.client_link, facts.server.link if facts.server else None
    refuses = config.limits_refusal == "reset"

    def leaving(packet: Packet, ports: Ports, where: str) -> Passage:
        return Passage(OWN, tuple(Stage(hook, packet, ports, where) for hook in LEAVING))

    to_client = "that krelay itself sends to clients"
    for service in config.services:
        ports = (service.first, service.last)
        rst = Packet("tcp", ours, ports[0], client, None, "", near, True, state="invalid")
        if service.proto == "tcp":
            yield leaving(rst, ports, to_client)
        elif refuses:
            error = rst._replace(proto="icmp", sport=None)
            yield leaving(error, NO_PORTS, to_client)
        if service.forward:
            yield leaving(rst._replace(state="new"), ports, to_client)
            end = Packet("tcp", client, None, server, ports[0], "", far, state="established")
            if config.source == "relay":
                end = end._replace(src=ours, src_local=True, state="new")
            yield leaving(end, ports, "that krelay itself sends to the server")
    if config.terminated:
        direct = Packet("tcp", ours, config.gport, client, None, "", near, True, state="invalid")
        yield leaving(direct, (config.gport, config.gport), to_client)


class _Trouble(NamedTuple):
    step: str
    stage: Stage
    """Its packet as it is there."""
    fate: Fate


def forgotten(facts: Facts) -> Iterator[tuple[str, Fate]]:
    """Protocols whose answers rules let by only as long as connection tracking knows their flow,
    each with what stops them once it has forgotten it.
    """
    for passage in passages(facts):
        replies = [stage for stage in passage.stages if stage.packet.reply]
        if any(t.fate.certain and t.fate.kind == "drop" for t in _troubles(facts, passage)):
            continue  # they don't get by as it is
        new = [stage._replace(packet=stage.packet._replace(state="new")) for stage in replies]
        for trouble in _troubles(facts, passage._replace(stages=tuple(new))):
            if trouble.fate.kind == "drop" and trouble.fate.certain:
                yield trouble.stage.packet.proto, trouble.fate


def translates_own(facts: Facts) -> bool:
    """Whether rules lead what this host sends to a service of its own address elsewhere."""
    ours = int(next(iter(facts.own))) if len(facts.own) == 1 else None
    for service in facts.config.services:
        packet = Packet(
            service.proto, ours, None, ours, service.first, "", "lo", src_local=True, dst_local=True
        )
        fates, _ = judge(facts.chains, "output", packet)
        if not any(fate.kind == "nat" for fate in fates):
            return False
    return True


def marks_answers(facts: Facts) -> bool:
    """Whether rules may mark the server's packets to clients before these are routed."""
    for passage in passages(facts):
        for stage in passage.stages:
            if passage.step == "U3" and stage.hook == "prerouting":
                _, after = judge(facts.chains, stage.hook, stage.packet, *stage.priorities)
                if after.mark is None:
                    return True
    return False


def check(facts: Facts) -> list[Finding]:
    """A finding for each place where rules of the host stop, divert or disguise our packets."""
    ways = (*passages(facts), *own_packets(facts))
    troubles = [trouble for passage in ways for trouble in _troubles(facts, passage)]
    findings = dict.fromkeys(
        _finding(facts, list(group))
        for _, group in groupby(sorted(troubles, key=_place), key=_place)
    )
    if findings:
        return sorted(findings, key=lambda finding: finding.level is not Level.FAILED)
    hooked = sum(
        1 for chain in facts.chains if chain.hook and (chain.rules or chain.policy == "drop")
    )
    if not hooked:
        return [Finding(CHECK, Level.OK, "no rules but krelay's")]
    return [Finding(CHECK, Level.OK, f"the host's rules let by what is relayed (chains: {hooked})")]


def _troubles(facts: Facts, passage: Passage) -> Iterator[_Trouble]:
    """What befalls these packets, also behind where their way ends: as if that had been mended.

    So one look names all that has to be mended.
    """
    tracked: bool | None = True
    mark: int | None = 0
    for stage in passage.stages:
        chains: Iterable[Chain] = facts.chains
        if stage.priorities == BEFORE_OURS:  # of iptables' own rules ours are the first
            chains = [c for c in chains if c.tool == "nft" or c.tool != facts.backend]
        packet = stage.packet._replace(tracked=tracked, mark=mark)
        fates, after = judge(chains, stage.hook, packet, *stage.priorities, mended=True)
        for fate in fates:
            if fate.kind != "snat" or _hides_client(facts, passage):
                yield _Trouble(passage.step, stage._replace(packet=after), fate)
        tracked, mark = after.tracked, after.mark


def _hides_client(facts: Facts, passage: Passage) -> bool:
    """Whether source NAT changes what the server sees: TCP is rewritten after it."""
    return passage.step == "U1" and facts.config.source == "client" and not facts.beside


def _place(trouble: _Trouble) -> tuple[str, ...]:
    base, stage = trouble.fate.base, trouble.stage
    rule = trouble.fate.rule
    return (
        trouble.step,
        stage.where,
        stage.hook,
        stage.packet.proto,
        base.tool,
        base.family,
        base.table,
        base.name,
        trouble.fate.kind,
        str(trouble.fate.certain),
        rule.text if rule else "",
        str(stage.priorities == BEFORE_OURS),
    )


def _finding(facts: Facts, troubles: list[_Trouble]) -> Finding:
    step, stage, fate = troubles[0]
    packet = stage.packet
    ports = tuple(dict.fromkeys(trouble.stage.ports for trouble in troubles))
    shown = ",".join(_span(pair, "-") for pair in ports)
    which = "to" if packet.dport is not None else "from"
    verb = "is" if fate.certain else "may be"
    what = {
        "drop": f"{verb} dropped",
        "queue": f"{verb} put into another program's queue",
        "nat": f"{verb} sent elsewhere",
        "tproxy": f"{verb} caught by a transparent proxy",
        "flow": f"{verb} handed to a flow table, so that later packets pass krelay by,",
        "snat": f"{verb} given another source, so the server won't see the client,",
    }[fate.kind]
    about = "" if packet.proto == "icmp" else f" {which} port {shown}"
    text = f"{packet.proto} {stage.where}{about} {what} by {fate.cause} ({step}, {stage.hook})"
    if step == OWN:
        text += ": who is refused, or killed, isn't told"
    failed = fate.certain and fate.kind != "snat" and step != OWN
    mend = _mend(facts, stage, fate, ports)
    return Finding(CHECK, Level.FAILED if failed else Level.WARNING, text, mend)


def _mend(facts: Facts, stage: Stage, fate: Fate, ports: tuple[Ports, ...]) -> str:
    """A command that lets by what is ours, and no more, ahead of what the chain has."""
    packet, base = stage.packet, fate.base
    server = facts.config.real_ip
    stateful = packet.reply and packet.tracked and base.priority > CONNTRACK_PRIORITY
    toward = "dport" if packet.dport is not None else "sport"
    host = ""
    if packet.dst == int(server):
        host = "d"
    elif packet.src == int(server):
        host = "s"
    if not packet.reply and packet.proto != "icmp" and packet.src != int(server):
        for by_tool in (_ufw, _firewalld):
            if command := by_tool(facts, stage, fate, ports):
                return command
    if packet.proto == "icmp":
        if base.tool == "nft":
            allowed = "icmp type destination-unreachable accept"
            return f"nft insert rule {base.family} {base.table} {base.name} {allowed}"
        table = "" if base.table == "filter" else f"-t {base.table} "
        allowed = "-p icmp --icmp-type destination-unreachable -j ACCEPT"
        return f"{base.tool} -w {table}-I {base.name} {allowed}"
    if base.tool == "nft":
        spans = ", ".join(_span(pair, "-") for pair in ports)
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

    A port is added to its zone, unless somebody's rule there, or a policy, comes first.  Everything
    else is a policy of our own, ahead of all others.
    """
    base, packet = fate.base, stage.packet
    if base.table != "firewalld" or "firewall-cmd" not in facts.tools:
        return ""
    to_gate = packet.dst_local and packet.dport == facts.config.gport
    if not (base.hook == "forward" or (base.hook == "input" and to_gate)):
        return ""
    ranges = [_span(pair, "-") for pair in ports]
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
        return [f"--{toward} {_span(ports[0], ':')}"]
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
        groups[-1].append(_span((low, high), ":"))
        room -= cost
    return groups


def _span(pair: Ports, between: str) -> str:
    low, high = pair
    return f"{low}" if low == high else f"{low}{between}{high}"
