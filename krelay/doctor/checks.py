"""Facts -> findings: one check a function, in the order in which they are shown.

Nothing here looks at the host, so each check can be shown every host there is.  A fix is a command
as root would type it in a shell; `safe` ones change nothing but kernel settings that relaying needs
and what a dead krelay left.
"""

from collections.abc import Callable, Iterable

from krelay.doctor import conntrack, installation, ports, routing, rulecheck
from krelay.doctor.facts import Facts
from krelay.doctor.findings import FAILED, OK, WARNING, Finding, not_tried
from procfs_sim.tree import in_force

NEEDS = {
    "queue": ("queue",),
    "rules": ("rules",),
    "datapath": ("rules",),
    "krelay": ("krelay",),
    "file tree": ("file tree",),
    "leftovers": ("file tree", "firewall", "queue"),
    "forwarding": ("kernel settings", "links"),
    "rp_filter": ("kernel settings", "links"),
    "VRF": ("links",),
    "redirects": ("links", "routes"),
    "uplinks": ("uplinks", "firewall"),
    "ports": ("kernel settings",),
    "own ports": ("kernel settings",),
    "this host": ("firewall",),
    "answers": ("krelay",),
    "timers": ("kernel settings", "firewall"),
    "server": ("routes",),
    "client": ("routes",),
    "return": ("return", "routes"),
    "gateway port": ("listeners", "gateway port"),
    "services": ("listeners",),
    "firewall": ("firewall", "links"),
    "conntrack": ("kernel settings",),
    "UDP GRO": ("links", "UDP GRO"),
    "buffer": ("kernel settings",),
    "files": ("privileges",),
}
"""The parts of the host (gather.py) that have to be seen before a check can say "ok"."""


def examine(facts: Facts) -> list[Finding]:
    """Every check's findings.  None is ok that rests on what wasn't seen."""
    found = [finding for check in CHECKS for finding in check(facts)]
    return [_as_far_as_seen(facts, finding) for finding in found]


def _as_far_as_seen(facts: Facts, finding: Finding) -> Finding:
    if finding.level is not OK:
        return finding
    needed = NEEDS.get(finding.check, ())
    reasons = [reason for part, reason in facts.unseen if part in needed]
    return not_tried(finding.check, reasons[0]) if reasons else finding


def surroundings(facts: Facts) -> list[Finding]:
    """What makes relaying fail quietly and may come right by itself: routes, forwarding.

    For the daemon, which looks at no more each time it begins.
    """
    return mattering([*routing.forwarding(facts), *routing.server(facts)])


def mattering(findings: Iterable[Finding]) -> list[Finding]:
    """The failures and the warnings."""
    return [finding for finding in findings if finding.level in (WARNING, FAILED)]


def fatal(findings: Iterable[Finding]) -> list[Finding]:
    """Those because of which relaying can't begin."""
    return [finding for finding in findings if finding.fatal]


def problems(facts: Facts) -> list[Finding]:
    """What couldn't be looked at."""
    return [
        Finding(what, WARNING, f"can't be looked at: {reason}") for what, reason in facts.problems
    ]


def settings(facts: Facts) -> list[Finding]:
    """What is checked: the values in force, or those that were asked about."""
    if facts.conflict:
        return [Finding("settings", FAILED, facts.conflict, fatal=True)]
    shown = ", ".join(
        f"{name} {in_force(name, facts.config)}"
        for name in ("real_ip", "gport", "services", "source")
    )
    return [Finding("settings", OK, shown)]


CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
    installation.privileges,
    installation.packages,
    settings,
    installation.queue,
    installation.rules,
    installation.datapath,
    installation.serving,
    installation.tree,
    installation.leftovers,
    routing.forwarding,
    routing.rp_filter,
    routing.vrf,
    routing.redirects,
    routing.server,
    routing.client,
    routing.uplinks,
    routing.return_path,
    ports.gateway_port,
    ports.services,
    ports.ports,
    ports.own_ports,
    ports.own_clients,
    ports.answers,
    rulecheck.check,
    conntrack.tracking,
    conntrack.timers,
    routing.gro,
    installation.buffer,
    installation.files,
    problems,
)
