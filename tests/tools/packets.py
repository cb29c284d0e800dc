"""Packets of tests, built from scratch: the slow twin of what knet.wire and the worker do.

A Template says what a packet is; `build` lays out every byte of it, with checksums summed word by
word, the way RFC 1071 tells it.  Nothing here calls knet.wire, so that both can't be wrong
together.  What a rewritten packet must look like is therefore one line: `replace(template,
flow=other).build()`.

The hosts have one letter each, those of the design: client C, relay K, server S.
"""

from dataclasses import dataclass, replace
from ipaddress import IPv4Network

from knet.endpoint import Endpoint, FiveTuple, Proto, Source
from krelay.datapath.policy import Policy

HOSTS = {
    "C": "10.0.0.1",
    "D": "10.0.0.9",  # another client
    "G": "10.0.0.254",  # the relay's address towards the clients
    "K": "192.168.0.2",
    "S": "192.168.0.1",
    "Z": "192.168.0.99",  # another server
    "N": "192.168.0.7",  # a client in the server's own subnet
    "R": "172.16.9.1",  # a router between relay and server
    "Q": "172.16.5.1",  # a router between client and relay
}
NAMES = {host: name for name, host in HOSTS.items()}

LETTERS = {"F": 0x01, "S": 0x02, "R": 0x04, "P": 0x08, ".": 0x10, "U": 0x20, "!": 0}
FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10


def at(text: str) -> Endpoint:
    """The endpoint `C:40000` or `10.0.0.1:40000`."""
    host, _, port = text.rpartition(":")
    return Endpoint.of(HOSTS.get(host, host), int(port))


def addr(name: str) -> bytes:
    """A host's packed address, by its letter."""
    return at(f"{name}:0").addr


def shown(endpoint: Endpoint) -> str:
    """The reverse of `at`, with letters."""
    return f"{NAMES.get(endpoint.host, endpoint.host)}:{endpoint.port}"


def flow(text: str) -> FiveTuple:
    """The flow `C:40000 > K:80 [S]` (TCP) or `C:40000 > K:53` (UDP)."""
    proto = Proto.TCP if text.rstrip().endswith("]") else Proto.UDP
    src, dst = text.partition("[")[0].split(">")
    return FiveTuple(proto, at(src.strip()), at(dst.strip()))


def flags_of(text: str) -> int:
    """The flags of `... [S.]`; 0 without brackets."""
    return sum(LETTERS[letter] for letter in text.partition("[")[2].partition("]")[0])


EVERY_PORT = frozenset(range(1, 1 << 16))


def policy(**changes: object) -> Policy:
    """The relay of the design: K:80, K:443 and K:53 are relayed to S through K:16000."""
    usual = Policy(
        gport=16000,
        served=EVERY_PORT,
        server=addr("S"),
        source=Source.CLIENT,
        tcp=frozenset({80, 443}),
        udp=frozenset({53}),
        own=frozenset({addr("K"), addr("G")}),
        beside=(IPv4Network("192.168.0.0/24"),),
        towards=addr("K"),
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


def slow_sum(data: bytes) -> int:
    """The one's complement sum of 16-bit words, added one by one (RFC 1071, section 1)."""
    total = 0
    for i in range(0, len(data), 2):
        total += data[i] << 8 | (data[i + 1] if i + 1 < len(data) else 0)
        if total > 0xFFFF:
            total -= 0xFFFF
    return total


def slow_checksum(data: bytes) -> int:
    """The complement of that sum."""
    return ~slow_sum(data) & 0xFFFF


@dataclass(frozen=True, slots=True)
class Template:
    """A packet in its parts.  Lengths and checksums follow from them."""

    flow: FiveTuple
    payload: bytes = b""
    flags: int = ACK
    seq: int = 1000
    ack: int = 2000
    tos: int = 0
    ident: int = 0
    fragment: int = 0x4000
    ttl: int = 64
    ip_options: bytes = b""
    """A multiple of four bytes, 40 at most; likewise `tcp_options`."""
    tcp_options: bytes = b""
    check: bool = True
    """UDP: whether there is a checksum."""
    padding: bytes = b""
    """UDP: bytes behind the datagram, within the IP packet."""
    check_error: int = 0
    """By how much the transport checksum is wrong, modulo 65535."""
    ip_check_error: int = 0

    def build(self) -> bytes:
        """All its bytes."""
        segment = self._tcp() if self.flow.proto is Proto.TCP else self._udp()
        length = 20 + len(self.ip_options)
        head = b"".join(
            (
                bytes((0x40 | length // 4, self.tos)),
                (length + len(segment)).to_bytes(2),
                self.ident.to_bytes(2),
                self.fragment.to_bytes(2),
                bytes((self.ttl, self.flow.proto)),
                b"\0\0",
                self.flow.src.addr,
                self.flow.dst.addr,
                self.ip_options,
            )
        )
        check = _off(slow_checksum(head), self.ip_check_error)
        return head[:10] + check.to_bytes(2) + head[12:] + segment

    def _covered(self, segment: bytes) -> bytes:
        addresses = self.flow.src.addr + self.flow.dst.addr
        return addresses + bytes((0, self.flow.proto)) + len(segment).to_bytes(2) + segment

    def _ports(self) -> bytes:
        return self.flow.src.port.to_bytes(2) + self.flow.dst.port.to_bytes(2)

    def _udp(self) -> bytes:
        head = self._ports() + (8 + len(self.payload)).to_bytes(2)
        check = 0
        if self.check:
            check = slow_checksum(self._covered(head + b"\0\0" + self.payload))
            check = _off(check, self.check_error) or 0xFFFF
        return head + check.to_bytes(2) + self.payload + self.padding

    def _tcp(self) -> bytes:
        offset = 20 + len(self.tcp_options)
        head = self._ports() + self.seq.to_bytes(4) + self.ack.to_bytes(4)
        head += bytes((offset // 4 << 4, self.flags)) + (4096).to_bytes(2)
        body = b"\0\0" + self.tcp_options + self.payload
        check = _off(slow_checksum(self._covered(head + b"\0\0" + body)), self.check_error)
        return head + check.to_bytes(2) + body

    @property
    def l4(self) -> int:
        """Where the transport header begins."""
        return 20 + len(self.ip_options)


def template(text: str, **parts: object) -> Template:
    """A packet of a trace: `C:40000 > K:80 [S]`, with the payload that suits its flags.

    And with numbers that suit a connection, of both ends alike: each begins with 1000, and all that
    it ever says ends before 1001, a FIN too, so that a packet may come at any time.  `[F.!]` has
    numbers of another connection.
    """
    there = flow(text)
    flags = flags_of(text)
    payload = b"some bytes" if flags & PSH or there.proto is Proto.UDP else b""
    following = 0x50000001 if "!" in text else 1001
    size = 1 if flags & SYN else len(payload) + bool(flags & FIN)
    ack = following if flags & ACK else 0
    usual = {"payload": payload, "flags": flags, "seq": following - size, "ack": ack}
    return Template(there, **usual | parts)  # type: ignore[arg-type]


def with_zero_check(packet: Template, on: FiveTuple) -> Template:
    """The packet with a last payload word that makes its checksum zero on this flow.

    Its payload is even and not empty.
    """
    blank = replace(packet, payload=packet.payload[:-2] + b"\0\0", check_error=0, check=True)
    built = replace(blank, flow=on).build()
    where = packet.l4 + (16 if on.proto is Proto.TCP else 6)
    missing = int.from_bytes(built[where : where + 2])
    return replace(blank, payload=blank.payload[:-2] + missing.to_bytes(2))


def with_zero_ip_check(packet: Template, on: FiveTuple) -> Template:
    """The packet with an identification that makes its header checksum zero on this flow."""
    blank = replace(packet, ident=0, ip_check_error=0)
    built = replace(blank, flow=on).build()
    return replace(blank, ident=int.from_bytes(built[10:12]))


def _off(check: int, error: int) -> int:
    return (check + error) % 0xFFFF if error else check
