"""The table of steps as rules have it: which packets take a step, and what it changes in them.

One line a step.  The rule that sends such packets to the worker (queued.py) and the rule by which
the kernel rewrites those of offloaded flows itself (offloaded.py) both come from that line.
"""

from typing import NamedTuple

from knet.endpoint import Proto
from knet.rules.ports import Ports, single
from knet.rules.rows import IsLocal, OneOf, Port, RowMatch, Within
from knet.wire.tcp import ACK, FIN, RST, SYN
from krelay.rules.spec import RuleSpec
from krelay.steps import SIDES, Step

PRE, POST = "pre", "post"
"""The chains of the two hooks, and the beginnings of the names of those behind them."""
WORKER, OPENINGS = "to-worker", "openings"
"""nft's chains that send packets to the two queues."""
OFFLOADED = "offloaded"
"""nft's chain that lets go of packets which the kernel will rewrite."""


class StepRow(NamedTuple):
    """One step.  Ends are named by the field that must hold them: `saddr` or `daddr`."""

    hook: str
    """The chain in which it happens: PRE or POST."""
    field: str
    """What it changes; of some flows the port beside, too."""
    towards: bool
    """Whether these packets go to the service's port, or come from it."""
    local: str = ""
    """The end that is this host."""
    server: str = ""
    """The end that is a server."""
    client: str = ""
    """The end that is a client whose source may have to be changed (RuleSpec.relay_clients)."""
    at_gport: bool = False
    """Whether these packets come from a gateway port, instead of the service's."""
    flags: tuple[int, int] = (FIN | SYN | RST, 0)
    """TCP: those of a packet's flags that matter, and what they must be for the kernel to rewrite
    it.  What begins a connection has no ACK: so none begins past the worker, in another flow's
    name.  Of tcp-relay's own, FINs and one SYN may pass besides (offload/programs/relay.c)."""

    @property
    def port_field(self) -> str:
        """Where the service's port is."""
        return "dport" if self.towards else "sport"


STEP_ROWS = {
    Step.T1: StepRow(PRE, "dport", True, local="daddr", flags=(SYN | RST, 0)),
    Step.T2: StepRow(POST, "sport", False, local="saddr", at_gport=True, flags=(RST | ACK, ACK)),
    Step.T3: StepRow(POST, "saddr", True, local="saddr", server="daddr", flags=(RST | ACK, ACK)),
    Step.T4: StepRow(PRE, "daddr", False, server="saddr", flags=(RST | ACK, ACK)),
    Step.U12: StepRow(PRE, "daddr", True, local="daddr"),
    Step.U34: StepRow(POST, "saddr", False, server="saddr"),
    Step.U1: StepRow(PRE, "daddr", True, local="daddr", client="saddr"),
    Step.U2: StepRow(POST, "saddr", True, server="daddr", client="saddr"),
    Step.U3: StepRow(PRE, "daddr", False, local="daddr", server="saddr"),
    Step.U4: StepRow(POST, "saddr", False, server="saddr", client="daddr"),
}
"""Not D1 and D2, which are rare."""

TERMINATED = tuple(step for step in STEP_ROWS if step.name.startswith("T"))
"""The steps of TCP that tcp-relay terminates."""
DSCP_STEPS = tuple(step for step in TERMINATED if step in SIDES)
"""The steps of what comes from an end of terminated TCP: its DSCP goes on to the other one, so a
packet with another than the last is the worker's."""


def ports_of(spec: RuleSpec, proto: Proto, step: Step) -> Ports:
    """The ports by which the packets of this step are known."""
    if STEP_ROWS[step].at_gport:
        return single(spec.gports)
    if proto is Proto.UDP:
        return spec.udp
    return spec.tcp if step in TERMINATED else spec.forwarded


def ends_of(spec: RuleSpec, proto: Proto, step: Step) -> tuple[RowMatch, ...]:
    """What all packets of this step have in common, and no others that are relayed."""
    row = STEP_ROWS[step]
    match: list[RowMatch] = []
    if row.client:
        match.append(Within(row.client, spec.relay_clients))
    if row.server:
        match.append(OneOf(row.server, spec.servers))
    match.append(Port(proto.name.lower(), row.port_field, ports_of(spec, proto, step)))
    if row.local:
        match.append(IsLocal(row.local))
    return tuple(match)
