"""What the demo claims, as functions from what was seen to a mark.  Pure.

There are three witnesses that know nothing of each other: the wires of client and server, captured
below any rule; krelay's own trace and NAT table; and the server's logs.  A step counts as shown
only if they agree: as many packets rewritten as seen on the wires, in the right form on each.

                    before => after                  seen on
    T1      C:x > K:80    => C:x > K:A       the client's wire, before
    T2      K:A > C:x     => K:80 > C:x      the client's wire, after
    T3      K:y > S:80    => C:y > S:80      the server's wire, after
    T4      S:80 > C:y    => S:80 > K:y      the server's wire, before
    U1,U2   C:x > K:53    => C:x > S:53      the client's, before; the server's, after
    U3,U4   S:53 > C:x    => K:53 > C:x      the server's, before; the client's, after

What isn't seen matters as much: the gateway port A on no wire, the relay's address not on the
server's, the server's not on the client's.  Each check is a function that can say no, so that it
can be tested by evidence that is wrong.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from knet.endpoint import Endpoint, FiveTuple, Proto
from knet.wire import BadPacket, ipv4, tcp, udp
from knet.wire.checksum import checksum

ETHERNET = 14
"""Bytes of the link header, whose last two are the type (IEEE 802.3)."""
ETHERTYPE_IPV4 = b"\x08\x00"


class Check(NamedTuple):
    """A claim and whether it held; `found` says what was there instead if it didn't."""

    claim: str
    held: bool
    found: str = ""


@dataclass(frozen=True, slots=True)
class Cast:
    """Who takes part."""

    client: str
    relay: str
    server: str
    gport: int
    http: int = 80
    dns: int = 53


class Seen(NamedTuple):
    """A packet on a wire; its ports are 0 if it is neither TCP nor UDP."""

    proto: int
    src: Endpoint
    dst: Endpoint
    flags: str
    """TCP's, as `S.`; empty for others."""
    arrived: bool
    """Whether it came in at the host whose wire it is; else the host sent it."""
    sound: bool
    """Whether its checksums are right.  Of packets that the host sent they aren't yet made."""

    def __str__(self) -> str:
        return f"{self.src} > {self.dst}"

    def of(self, five_tuple: FiveTuple) -> bool:
        """Whether it belongs to the flow."""
        return (self.proto, self.src, self.dst) == five_tuple


class Traced(NamedTuple):
    """A line of krelay's trace."""

    step: str
    src: Endpoint
    dst: Endpoint
    new_src: Endpoint
    new_dst: Endpoint

    def __str__(self) -> str:
        return f"{self.src} > {self.dst} => {self.new_src} > {self.new_dst}"


class ShownStep(NamedTuple):
    """One rewriting as it must be, and on which wires either form of the packet is seen."""

    label: str
    title: str
    before: FiveTuple
    after: FiveTuple
    before_on: str | None
    after_on: str | None


Wires = Mapping[str, Sequence[Seen]]
"""What was seen on the wire of `client` and of `server`, in order."""


# Reading the evidence


def seen(frame: bytes, *, outgoing: bool) -> Seen | None:
    """The packet in a frame from a wire; None for anything but IPv4."""
    if len(frame) < ETHERNET or frame[ETHERNET - 2 : ETHERNET] != ETHERTYPE_IPV4:
        return None
    total = int.from_bytes(frame[ETHERNET + 2 : ETHERNET + 4])
    packet = frame[ETHERNET : ETHERNET + total]  # a short packet is padded on a real wire
    try:
        header = ipv4.parse(packet)
    except BadPacket:
        return None
    segment = packet[header.length :]
    ports = (0, 0)
    is_tcp = header.proto == Proto.TCP and len(segment) >= tcp.HEADER
    if is_tcp or (header.proto == Proto.UDP and len(segment) >= udp.HEADER):
        ports = (int.from_bytes(segment[:2]), int.from_bytes(segment[2:4]))
    return Seen(
        header.proto,
        Endpoint(header.src, ports[0]),
        Endpoint(header.dst, ports[1]),
        tcp.flags_text(segment[tcp.FLAGS]) if is_tcp else "",
        not outgoing,
        _is_sound(packet, header),
    )


def _is_sound(packet: bytes, header: ipv4.Header) -> bool:
    segment = packet[header.length :]
    if checksum(packet[: header.length]):
        return False
    if header.proto not in (Proto.TCP, Proto.UDP):
        return True
    if header.proto == Proto.UDP and segment[udp.CHECK : udp.CHECK + 2] == b"\0\0":
        return True  # the sender made none
    return not checksum(
        ipv4.pseudo_header(header.proto, header.src, header.dst, len(segment)) + segment
    )


_TRACED = re.compile(
    r"(?P<step>[TUD]\d(?:,U\d)?) (?P<src>\S+) > (?P<dst>\S+)(?: \[\S*\])?(?: \d+ bytes)?"
    r" => (?P<new_src>[\d.:]+)? ?>(?: (?P<new_dst>[\d.:]+))? flow \d+"
)


def traced(line: str) -> Traced | None:
    """A line of the trace, as `T1 A > B [S] => > C flow 17`; None for any other line."""
    match = _TRACED.fullmatch(line)
    if match is None:
        return None
    src, dst = Endpoint.parse(match["src"]), Endpoint.parse(match["dst"])
    new_src, new_dst = match["new_src"], match["new_dst"]
    return Traced(
        match["step"],
        src,
        dst,
        Endpoint.parse(new_src) if new_src else src,
        Endpoint.parse(new_dst) if new_dst else dst,
    )


def flow_of(flows: Iterable[Mapping[str, Any]], proto: str) -> Mapping[str, Any] | None:
    """The flow of that protocol, if there is exactly one."""
    found = [flow for flow in flows if flow["proto"] == proto]
    return found[0] if len(found) == 1 else None


def steps(
    cast: Cast, tcp_flow: Mapping[str, Any], udp_flow: Mapping[str, Any]
) -> tuple[ShownStep, ...]:
    """The six rewritings that these two flows stand for.

    Only the ephemeral ports are the flows'; all else is as the cast says it must be.
    """

    def five_tuple(proto: Proto, src: tuple[str, int], dst: tuple[str, int]) -> FiveTuple:
        return FiveTuple(proto, Endpoint.of(*src), Endpoint.of(*dst))

    c, k, s, http, dns = cast.client, cast.relay, cast.server, cast.http, cast.dns
    x, y = port(tcp_flow["client"]), port(tcp_flow["relay"])
    u = port(udp_flow["client"])
    t1 = five_tuple(Proto.TCP, (c, x), (k, http)), five_tuple(Proto.TCP, (c, x), (k, cast.gport))
    t3 = five_tuple(Proto.TCP, (k, y), (s, http)), five_tuple(Proto.TCP, (c, y), (s, http))
    u1 = five_tuple(Proto.UDP, (c, u), (k, dns)), five_tuple(Proto.UDP, (c, u), (s, dns))
    return (
        ShownStep("T1", "client to relay", *t1, "client", None),
        ShownStep("T2", "relay to client", t1[1].reply(), t1[0].reply(), None, "client"),
        ShownStep("T3", "relay to server", *t3, None, "server"),
        ShownStep("T4", "server to relay", t3[1].reply(), t3[0].reply(), "server", None),
        ShownStep("U1,U2", "client to server", *u1, "client", "server"),
        ShownStep("U3,U4", "server to client", u1[1].reply(), u1[0].reply(), "server", "client"),
    )


def port(endpoint: str) -> int:
    """The port of `ADDRESS:PORT`."""
    return Endpoint.parse(endpoint).port


def on_wire(wire: Sequence[Seen], five_tuple: FiveTuple) -> list[Seen]:
    """The packets of this flow."""
    return [packet for packet in wire if packet.of(five_tuple)]


# The checks


def answers(claim: str, printed: str, wanted: str) -> Check:
    """The client's program printed exactly this."""
    return Check(claim, printed.strip() == wanted, f"it printed {printed.strip()!r}")


def rewritten(step: ShownStep, trace: Sequence[Traced], wires: Wires) -> Check:
    """Every packet of the step was rewritten as it must be, and seen so on the wires."""
    ours = [line for line in trace if line.step == step.label]
    claim = f"{step.label} {step.title}: {len(ours)} rewritten, and as many on the wire"
    wanted = (step.before.src, step.before.dst, step.after.src, step.after.dst)
    if not ours:
        return Check(claim, False, "the trace shows no packet of this step")
    for line in ours:
        if line[1:] != wanted:
            return Check(claim, False, f"{line} instead of {_arrow(step)}")
    for five_tuple, where in ((step.before, step.before_on), (step.after, step.after_on)):
        for name, wire in wires.items():
            count = len(on_wire(wire, five_tuple))
            if count != (len(ours) if name == where else 0):
                seen_as = f"{five_tuple.src} > {five_tuple.dst}"
                found = f"{seen_as}: {len(ours)} rewritten, {count} on the {name}'s wire"
                return Check(claim, False, found)
    return Check(claim, True)


def _arrow(step: ShownStep) -> str:
    five_tuples = (step.before, step.after)
    return " => ".join(f"{five_tuple.src} > {five_tuple.dst}" for five_tuple in five_tuples)


def settled(plan: Iterable[ShownStep], trace: Sequence[Traced], wires: Wires) -> bool:
    """Whether all that was rewritten has been seen, and the other way round: it is all over."""
    return all(rewritten(step, trace, wires).held for step in plan)


def only_between(claim: str, wire: Sequence[Seen], one: str, other: str) -> Check:
    """No packet on this wire is from or to anybody else."""
    both = {one, other}
    for packet in wire:
        if {packet.src.host, packet.dst.host} != both:
            return Check(claim, False, f"there was {packet}")
    return Check(claim, bool(wire), "there was nothing at all")


def unseen(claim: str, wires: Wires, gport: int) -> Check:
    """No packet on any wire has the gateway port."""
    for name, wire in wires.items():
        for packet in wire:
            if gport in (packet.src.port, packet.dst.port):
                return Check(claim, False, f"{packet} on the {name}'s wire")
    return Check(claim, all(wires.values()), "there was nothing at all")


def sound(claim: str, wires: Wires) -> Check:
    """What arrives, rewritten, has right checksums."""
    arrived = [packet for wire in wires.values() for packet in wire if packet.arrived]
    for packet in arrived:
        if not packet.sound:
            return Check(claim, False, f"wrong in {packet}")
    return Check(claim, bool(arrived), "nothing arrived at all")


def logged(claim: str, line: str, address: str) -> Check:
    """The server's log line names this address, `ADDRESS` or `ADDRESS/PORT` or `ADDRESS:PORT`."""
    return Check(claim, address in line.split(), f"the log says {line!r}")


def tabled(claim: str, flow: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> Check:
    """There is this flow in the NAT table, and it has these values."""
    if flow is None:
        return Check(claim, False, "there is not exactly one such row")
    wrong = [f"{name}={flow.get(name)}" for name in wanted if flow.get(name) != wanted[name]]
    return Check(claim, not wrong, " ".join(wrong))


def no_rules(claim: str, listings: Iterable[str]) -> Check:
    """Neither `iptables-save` nor `nft list ruleset` shows any rule, or chain of anybody's own.

    A kernel that has had rules of iptables' keeps their tables, with its own chains, empty.
    """
    shown = list(listings)
    for listing in shown:
        for line in listing.splitlines():
            if line.strip() and not _SAYS_NOTHING.fullmatch(line):
                return Check(claim, False, f"there is {line.strip()!r}")
    return Check(claim, bool(shown), "nothing lists them here")


_SAYS_NOTHING = re.compile(r"#.*|\*[a-z]+|:[A-Z]+ ACCEPT \[\d+:\d+\]|COMMIT")


def refused(claim: str, status: int, wire: Sequence[Seen], host: str, port: int) -> Check:
    """`curl` couldn't connect (its status 7), and a RST from the host itself was the reason."""
    if status != 7:
        return Check(claim, False, f"curl ended with status {status}")
    resets = [p for p in wire if p.arrived and (p.src.host, p.src.port) == (host, port)]
    return Check(
        claim,
        bool(resets) and all("R" in packet.flags for packet in resets),
        f"the client got {', '.join(packet.flags for packet in resets) or 'nothing'} from it",
    )


def failures(checks: Iterable[Check]) -> list[str]:
    """One line for each check that didn't hold."""
    return [f"{check.claim}: {check.found}" for check in checks if not check.held]
