"""Packets for people: one line for each, and which of them a trace selects.

    T1 10.0.0.1:40000 > 192.168.0.2:80 [S] => > 192.168.0.2:16000 flow 17
    drop gateway_port 10.0.0.9:5000 > 192.168.0.2:16000 [S] answered [R.]
    pass no_flow 10.0.0.1:40000 > 192.168.0.2:80 [.]

Behind the arrow stands only what has changed, with `>` on the side where the rest is: `=> > DST` a
new destination, `=> SRC >` a new source; of an ICMP error also the packet it is about.  A packet
that wasn't rewritten has its verdict and the reason in front, by the words of the counters.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

from knet.endpoint import Endpoint, Proto
from knet.wire import icmp, ipv4, tcp, udp
from krelay.datapath.verdict import Verdict
from krelay.nat.flow import Flow, Rewrite

WORDS = {Verdict.PASS: "pass", Verdict.DROP: "drop"}
REWRITE = "rewrite"


class Sight(NamedTuple):
    """A packet as people read it."""

    proto: int
    src: Endpoint
    dst: Endpoint
    """Their ports are 0 where there are none to be seen."""
    detail: str
    """TCP's flags, the size of the payload: ` [P.] 75 bytes`."""
    about: str = ""
    """Of an ICMP error: the packet that it quotes, ` about 10.0.0.1:4000 > 192.168.0.1:53`."""

    @property
    def ends(self) -> tuple[str, str]:
        """Source and destination as text."""
        if self.src.port or self.dst.port:
            return str(self.src), str(self.dst)
        return self.src.host, self.dst.host


class Untouched(NamedTuple):
    """A packet that wasn't rewritten."""

    packet: bytes
    hook: int
    verdict: Verdict
    reason: str
    answers: tuple[bytes, ...] = ()
    """What krelay answered it with."""
    from_server: bool = False
    """Whether it comes from the server of new flows."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which flows a trace or a listing selects; None means any.

    Tracing moves the selected flows to the slow path while it runs; the others stay offloaded.
    """

    proto: Proto | None = None
    client_addr: bytes | None = None
    client_port: int | None = None
    state: str | None = None
    service: tuple[Proto, int] | None = None

    def may_admit(self, proto: Proto, port: int) -> bool:
        """Whether flows of this service may be among them."""
        return self.proto in (None, proto) and self.service in (None, (proto, port))

    @property
    def in_any_state(self) -> "Filter":
        """The same, whatever state a flow is in."""
        return replace(self, state=None)

    def admits(self, flow: Flow) -> bool:
        """Whether the flow is among them."""
        return (
            (self.proto is None or flow.proto is self.proto)
            and (self.client_addr is None or flow.client.addr == self.client_addr)
            and (self.client_port is None or flow.client.port == self.client_port)
            and (self.service is None or (flow.proto, flow.service.port) == self.service)
            and (self.state is None or flow.state == self.state)
        )

    def admits_unmatched(self, packet: bytes) -> bool:
        """Whether a packet that no flow claims could be of such a flow, from or to its client."""
        if self == _ANY:
            return True
        seen = sight(packet)
        if seen is None or self.state is not None:
            return False
        ends = (seen.src, seen.dst)
        return (
            (self.proto is None or seen.proto == self.proto)
            and (
                (self.client_addr is None and self.client_port is None)
                or any(
                    self.client_addr in (None, end.addr) and self.client_port in (None, end.port)
                    for end in ends
                )
            )
            and (self.service is None or self.service in [(seen.proto, end.port) for end in ends])
        )


_ANY = Filter()


class Recorder(Protocol):
    """What becomes of packets that a trace selects.  Times are nanoseconds since 1970."""

    def begin(self) -> bytes:
        """What comes before all packets."""

    def rewritten(self, rewrite: Rewrite, before: bytes, after: bytes, at: int) -> bytes:
        """A packet as it came, and as it went on."""

    def untouched(self, what: Untouched, at: int) -> bytes:
        """A packet that wasn't rewritten."""

    def missed(self, what: Rewrite | Untouched) -> None:
        """There was no room for a packet."""

    def caught_up(self) -> bytes:
        """What there is to say when all before was read."""

    def end(self, at: int) -> bytes:
        """What comes behind all packets."""


class Lines:
    """A Recorder: a line each."""

    def __init__(self) -> None:
        self._lost = 0

    def begin(self) -> bytes:
        """Nothing."""
        return b""

    def rewritten(self, rewrite: Rewrite, before: bytes, after: bytes, at: int) -> bytes:
        """Its line."""
        return self.caught_up() + line(rewrite, before, after).encode() + b"\n"

    def untouched(self, what: Untouched, at: int) -> bytes:
        """Its line."""
        return self.caught_up() + untouched_line(what).encode() + b"\n"

    def missed(self, what: Rewrite | Untouched) -> None:
        """It is told of in front of the next line."""
        self._lost += 1

    def caught_up(self) -> bytes:
        """How many lines were lost, if any."""
        lost, self._lost = self._lost, 0
        return f"lost {lost} lines: the reader is too slow\n".encode() if lost else b""

    def end(self, at: int) -> bytes:
        """Nothing."""
        return b""


def line(rewrite: Rewrite, before: bytes, after: bytes) -> str:
    """The line for a packet that came so, and was rewritten so."""
    seen, new = sight(before), sight(after)
    if seen is None or new is None:
        return f"{rewrite.step.label} {len(before)} bytes flow {rewrite.flow.id}"
    (src, dst), (new_src, new_dst) = seen.ends, new.ends
    match (new_src != src, new_dst != dst):
        case (True, True):
            became = f" {new_src} > {new_dst}"
        case (True, False):
            became = f" {new_src} >"
        case (False, True):
            became = f" > {new_dst}"
        case _:
            became = "" if new.about != seen.about else " unchanged"
    if new.about != seen.about:
        became += new.about
    return (
        f"{rewrite.step.label} {src} > {dst}{seen.detail}{seen.about} =>{became} "
        f"flow {rewrite.flow.id}"
    )


def untouched_line(what: Untouched) -> str:
    """The line for a packet that wasn't rewritten."""
    seen = sight(what.packet)
    answered = [answer.detail.strip() for answer in map(sight, what.answers) if answer]
    return (
        f"{WORDS[what.verdict]} {what.reason} "
        + (
            f"{' > '.join(seen.ends)}{seen.detail}{seen.about}"
            if seen
            else f"{len(what.packet)} bytes"
        )
        + (f" answered {', '.join(answered)}" if answered else "")
    )


def sight(packet: bytes) -> Sight | None:
    """What can be seen of any bytes; None if they don't begin as an IPv4 packet does."""
    if len(packet) < ipv4.MIN_HEADER or packet[0] >> 4 != 4:
        return None
    at, proto, size = (packet[0] & 0xF) * 4, packet[9], len(packet)
    src, dst = packet[12:16], packet[16:20]
    behind = (int.from_bytes(packet[6:8]) & 0x1FFF) * 8
    sport = dport = 0
    about = ""
    detail = f" protocol {proto} {size - at} bytes"
    if behind:
        detail = f" fragment from byte {behind}"
    elif proto == Proto.TCP and size >= at + tcp.HEADER:
        length = size - at - (packet[at + 12] >> 4) * 4
        detail = f" [{tcp.flags_text(packet[at + tcp.FLAGS])}]"
        detail += f" {length} bytes" if length > 0 else ""
    elif proto == Proto.UDP and size >= at + udp.HEADER:
        total = int.from_bytes(packet[2:4])  # of a copy there is only the head
        detail = f" {max(size, total) - at - udp.HEADER} bytes"
    elif proto == icmp.PROTO and size >= at + 2:
        detail = f" icmp {packet[at]}/{packet[at + 1]}"
        quoted = sight(packet[at + icmp.HEADER :]) if packet[at] in icmp.ERRORS else None
        about = f" about {' > '.join(quoted.ends)}" if quoted else ""
    if proto in (Proto.TCP, Proto.UDP) and not behind and size >= at + 4:
        sport, dport = int.from_bytes(packet[at : at + 2]), int.from_bytes(packet[at + 2 : at + 4])
    return Sight(proto, Endpoint(src, sport), Endpoint(dst, dport), detail, about)
