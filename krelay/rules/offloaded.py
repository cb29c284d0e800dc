"""Rows by which the kernel relays offloaded flows itself, and their maps.  nft alone.  Pure.

There is a map for each step, from the addresses and ports that a packet comes with to the one field
that the step changes, and a counter.  Packets that tell how a connection stands go to the worker
all the same: SYN and RST of its ends and of this host, FIN of what is forwarded.  But a FIN by
which tcp-relay passes an end on need not wait for the worker: of it a copy is enough (`ends`).  Nor
need the SYN by which tcp-relay begins: one for each connection, which is known beforehand (the set
BEGINS), and copied (`begun`).  So no other program begins a connection past the worker from a port
that a flow had.  A flow that isn't in a map goes to the worker, so with empty maps these rows
change nothing.
"""

from knet.endpoint import Proto
from knet.netlink.nflog import HEAD
from knet.rules.rows import OneOf, Port, RowMatch, RuleRow, Statement, Within, Words
from krelay.rules.spec import RuleSpec, begun, ends
from krelay.rules.steprows import DSCP_STEPS, STEP_ROWS, TERMINATED, ports_of
from krelay.steps import SENDERS, SIDES, Side, Step

BEGINS = "tcp-begins"
"""The set of the connections to the server that tcp-relay may begin past the worker: once each."""
BEGINS_WITHIN = 5
"""Seconds for which it may."""
BEGINNING = next(step for step, side in SENDERS.items() if side is Side.TO_SERVER)
"""The step of the SYN with which tcp-relay begins."""
_ENDING = tuple(step for step in STEP_ROWS if SENDERS.get(step) in (Side.TO_CLIENT, Side.TO_SERVER))
"""The steps in which tcp-relay passes on that an end has ended its direction."""
_KEY = "ip saddr . th sport . ip daddr . th dport"
_KEY_TYPE = "ipv4_addr . inet_service . ipv4_addr . inet_service"


def map_name(proto: Proto, step: Step) -> str:
    """The name of the map of a step, and of its counter."""
    return f"{proto.name.lower()}-{step.name.lower()}"


def steps_offloaded(spec: RuleSpec) -> list[tuple[Proto, Step]]:
    """The steps for which there are maps, in the order in which a packet is looked for."""
    through = [Step.U12, Step.U34]
    if spec.relay_clients:
        through += [Step.U1, Step.U3, Step.U2, Step.U4]
    first, *others = TERMINATED
    steps: list[tuple[Proto, Step]] = []
    if spec.tcp:
        steps += [(Proto.TCP, step) for step in others]
    if spec.forwarded:
        steps += [(Proto.TCP, step) for step in through]
    if spec.tcp:
        steps.append((Proto.TCP, first))  # the last, since it may be asked of every packet
    if spec.udp:
        steps += [(Proto.UDP, step) for step in through]
    return steps if spec.room else []


def offloaded(spec: RuleSpec) -> list[RuleRow]:
    """The rows that look into maps, in order within each chain; they stand before all others."""
    rows = [_rewrite(spec, proto, step) for proto, step in steps_offloaded(spec)]
    if spec.tells_ends and spec.tcp and spec.room:
        rows += [_rewrite_fin(spec, step) for step in _ENDING]
        rows.append(_rewrite_syn(spec))
    return rows


def _rewrite(spec: RuleSpec, proto: Proto, step: Step) -> RuleRow:
    flags = Words(f"tcp flags & {STEP_ROWS[step].flags}")
    match = (*_guard(spec, proto, step), *((flags,) if proto is Proto.TCP else ()))
    return _row(spec, proto, step, step.label, match)


def _rewrite_fin(spec: RuleSpec, step: Step) -> RuleRow:
    """For the packets with which tcp-relay says that it has nothing more to say."""
    fin = Words("ip hdrlength 5 tcp flags & (fin | syn | rst) == fin")
    match = (*_guard(spec, Proto.TCP, step), fin)
    return _row(spec, Proto.TCP, step, f"{step.label} FIN", match, ends(spec.queue))


def _rewrite_syn(spec: RuleSpec) -> RuleRow:
    """For the packet with which tcp-relay begins its connection to the server."""
    step = BEGINNING
    syn = Words("ip hdrlength 5 tcp flags & (fin | syn | rst | ack) == syn")
    once = Words(f"{_KEY} @{BEGINS} delete @{BEGINS} {{ {_KEY} }}")
    match = (*_guard(spec, Proto.TCP, step), syn, once)
    return _row(spec, Proto.TCP, step, f"{step.label} SYN", match, begun(spec.queue))


def _row(
    spec: RuleSpec,
    proto: Proto,
    step: Step,
    label: str,
    match: tuple[RowMatch, ...],
    group: int | None = None,
) -> RuleRow:
    """`group`: the log group of the copies that are made of these packets."""
    name, chain, field = map_name(proto, step), _chain_of(proto, step), STEP_ROWS[step].field
    if "-" not in chain:
        match = (Words(f"ip protocol {proto.name.lower()}"), *match)
    key = f"{_KEY} . ip dscp" if _has_dscp(spec, proto, step) else _KEY
    where = "ip" if field.endswith("addr") else proto.name.lower()
    copied = "" if group is None else f"log group {group} snaplen {HEAD} "
    action = f"{where} {field} set {key} map @{name} {copied}counter name {name} accept"
    return RuleRow(label, chain, match, Statement(action))


def _guard(spec: RuleSpec, proto: Proto, step: Step) -> list[RowMatch]:
    """What spares most packets that aren't of this step the look-up in its map.

    It need not be exact.  Several ports are no guard: finding one among them costs as much as such
    a look-up.  The server's address tells instead, or nothing does.
    """
    row, ports = STEP_ROWS[step], ports_of(spec, proto, step)
    guard: list[RowMatch] = [Within(row.client, spec.relay_clients)] if row.client else []
    if (row.at_gport and ports) or (len(ports) == 1 and ports[0][0] == ports[0][1]):
        guard.append(Port("th", row.port_field, ports))
    elif row.server:
        guard.append(OneOf(row.server, spec.servers))
    return guard


def _has_dscp(spec: RuleSpec, proto: Proto, step: Step) -> bool:
    return spec.follows_dscp and proto is Proto.TCP and step in DSCP_STEPS


def _chain_of(proto: Proto, step: Step) -> str:
    """Where the kernel takes this step: that of most UDP packets before anything else."""
    hook = STEP_ROWS[step].hook
    if proto is Proto.UDP and step in (Step.U12, Step.U34):
        return hook
    return f"{hook}-{proto.name.lower()}"


def maps(spec: RuleSpec) -> list[str]:
    """What nft is told to make, a line each: maps, counters, the set BEGINS."""
    lines = []
    for proto, step in steps_offloaded(spec):
        value = "ipv4_addr" if STEP_ROWS[step].field.endswith("addr") else "inet_service"
        name = map_name(proto, step)
        lines.append(f"  counter {name} {{ }}")
        counted = " counter;" if step in SIDES else ""
        of = f"{_KEY_TYPE} . dscp" if _has_dscp(spec, proto, step) else _KEY_TYPE
        lines.append(f"  map {name} {{ type {of} : {value}; size {spec.room};{counted} }}")
    if spec.room and spec.tcp:
        lines.append(
            f"  set {BEGINS} {{ type {_KEY_TYPE}; flags dynamic, timeout; size {spec.room}; "
            f"timeout {BEGINS_WITHIN}s; }}"
        )
    return lines
