"""What the host's rules do with what is relayed: a finding for each place that stops it."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import NamedTuple

from krelay.doctor import rulefix
from krelay.doctor.facts import Facts
from krelay.doctor.findings import Finding, Level
from krelay.doctor.firewall import (
    Chain,
    Fate,
    Packet,
    judge,
)
from krelay.doctor.passages import BEFORE_OURS, OWN, Passage, Stage, own_packets, passages

CHECK = "firewall"


class _Trouble(NamedTuple):
    step: str
    stage: Stage
    """Its packet as it is there."""
    fate: Fate


def _ways(facts: Facts) -> Iterator[Passage]:
    """All passages.  An answer to what rules have taken out of connection tracking is as new there
    as what began it: tracking knows of neither before."""
    begins_anew = False
    for passage in passages(facts):
        if not passage.stages[0].packet.reply:
            *_, (_, _, last) = _walk(facts, passage)
            begins_anew = last.tracked is False
        elif begins_anew:
            stages = (s._replace(packet=s.packet._replace(state="new")) for s in passage.stages)
            passage = passage._replace(stages=tuple(stages))
        yield passage


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
    ways = (*_ways(facts), *own_packets(facts))
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
    """What befalls these packets, also behind where their way ends: as if that had been fixed.

    So one look names all that has to be fixed.
    """
    for stage, fates, after in _walk(facts, passage):
        for fate in fates:
            if fate.kind != "snat" or _hides_client(facts, passage):
                yield _Trouble(passage.step, stage._replace(packet=after), fate)


def _walk(facts: Facts, passage: Passage) -> Iterator[tuple[Stage, list[Fate], Packet]]:
    """By stage: what befalls the packet there, and as what it comes out."""
    tracked: bool | None = True
    mark: int | None = 0
    for stage in passage.stages:
        chains: Iterable[Chain] = facts.chains
        if stage.priorities == BEFORE_OURS:  # of iptables' own rules ours are the first
            chains = [c for c in chains if c.tool == "nft" or c.tool != facts.backend]
        packet = stage.packet._replace(tracked=tracked, mark=mark)
        fates, after = judge(chains, stage.hook, packet, *stage.priorities, fixed=True)
        yield stage, fates, after
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
    shown = ",".join(rulefix.span(pair, "-") for pair in ports)
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
    fix = rulefix.command(facts, stage, fate, ports)
    return Finding(CHECK, Level.FAILED if failed else Level.WARNING, text, fix)
