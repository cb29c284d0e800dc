"""TCP segments (RFC 9293, section 3.1), as far as a relay in the middle needs them.

 0               2               4                               8
+---------------+---------------+-------------------------------+
|  Source Port  |   Dest Port   |        Sequence Number        |   0
+---------------+---------------+------+--------+---------------+
|     Acknowledgment Number     |Offset| Flags  |    Window     |   8
+---------------+---------------+------+--------+---------------+
|   Checksum    |  Urgent Ptr   |   Options ...                 |  16
+---------------+---------------+-------------------------------+
"""

import struct

from knet.wire import ipv4
from knet.wire.checksum import checksum

HEADER = 20
SEQ = 4
"""Offset of the sequence number in the header."""
FLAGS = 13
"""Offset of the flags in the header."""
CHECK = 16
"""Offset of the checksum in the header."""
PROTO = 6

FIN, SYN, RST, PSH, ACK, URG = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20

_HEADER = struct.Struct("!HHIIBBHHH")
_LETTERS = ((SYN, "S"), (FIN, "F"), (RST, "R"), (PSH, "P"), (URG, "U"), (ACK, "."))


def flags_text(flags: int) -> str:
    """Flags as packet tools write them: `S`, `S.`, `P.`, `F.`, `R`."""
    return "".join(letter for flag, letter in _LETTERS if flags & flag)


def build(
    src: bytes,
    dst: bytes,
    sport: int,
    dport: int,
    flags: int,
    *,
    seq: int = 0,
    ack: int = 0,
    window: int = 0,
    payload: bytes = b"",
) -> bytes:
    """A whole IPv4 packet with this segment, without options."""
    head = _HEADER.pack(sport, dport, seq, ack, HEADER // 4 << 4, flags, window, 0, 0)
    covered = ipv4.pseudo_header(PROTO, src, dst, len(head) + len(payload)) + head + payload
    segment = head[:CHECK] + checksum(covered).to_bytes(2) + head[CHECK + 2 :] + payload
    return ipv4.build(PROTO, src, dst, segment)


def reset_for(packet: bytes, header: ipv4.Header) -> bytes | None:
    """The RST that answers a segment to a closed port (RFC 9293, section 3.10.7.1).

    `packet` holds a whole TCP header behind `header`.  None if it is a RST itself, which is never
    answered.
    """
    at = header.length
    sport, dport, seq, ack, offset, flags, _, _, _ = _HEADER.unpack_from(packet, at)
    if flags & RST:
        return None
    if flags & ACK:
        return build(header.dst, header.src, dport, sport, RST, seq=ack)
    length = max(0, header.total - at - (offset >> 4) * 4)
    length += bool(flags & SYN) + bool(flags & FIN)
    following = (seq + length) % 2**32
    return build(header.dst, header.src, dport, sport, RST | ACK, ack=following)
