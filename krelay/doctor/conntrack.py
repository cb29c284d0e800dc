"""Connection tracking: krelay needs none, but where it is full, or forgets, the host drops."""

from krelay.doctor import rulecheck
from krelay.doctor.facts import Facts
from krelay.doctor.findings import OK, WARNING, Finding

NEARLY_FULL = 0.9
DNS = 53


def tracking(facts: Facts) -> list[Finding]:
    """Connection tracking isn't needed, but where it is full the host drops new flows."""
    if facts.tracked is None:
        return [Finding("conntrack", OK, "no connection tracking here, and none is needed")]
    used, most = facts.tracked
    if most and used >= most * NEARLY_FULL:
        text = (
            f"connection tracking holds {used} of at most {most}: new flows are dropped when full"
        )
        fix = f"sysctl -w net.netfilter.nf_conntrack_max={2 * most}"
        return [Finding("conntrack", WARNING, text, fix, safe=True)]
    return [Finding("conntrack", OK, f"{used} connections tracked, of at most {most}")]


def timers(facts: Facts) -> list[Finding]:
    """A firewall that lets answers by because their flow is tracked, and for how long it is."""
    check = "timers"
    if facts.timers is None:
        return [Finding(check, OK, "no connection tracking here, so none of its timers either")]
    shorter = facts.timers.shorter(facts.config)
    if not shorter:
        return [Finding(check, OK, "connection tracking keeps flows as long as krelay does")]
    causes = dict(rulecheck.forgotten(facts))
    findings = []
    for proto, cause in causes.items():
        ending = [timer for timer in shorter if timer.proto == proto]
        if not ending:
            continue
        after = ", ".join(f"{timer.seconds} s ({timer.name})" for timer in ending)
        text = (
            f"connection tracking forgets {proto} flows after {after} of silence, krelay after "
            f"{ending[0].ours} s ({ending[0].setting}): then what a server says first is dropped "
            f"by {cause.cause}"
        )
        raised = " ".join(f"net.netfilter.{timer.name}={timer.ours}" for timer in ending)
        findings.append(Finding(check, WARNING, text, f"sysctl -w {raised}", safe=True))
    return findings or [Finding(check, OK, "no rule lets answers by for connection tracking alone")]
