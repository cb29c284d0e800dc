"""The Internet checksum (RFC 1071), and its update when a few bytes change (RFC 1624).

A sum of 16-bit words with end-around carry is arithmetic modulo 65535, and Python has the modulus
of big integers in C: a whole packet is one `int.from_bytes` and one `%`.  For a rewrite, what
matters is only by how much the sum of the changed words differs; that difference is a constant of
the flow, so the packet path adds one number.  An update never looks at the rest of the packet: one
that arrived broken leaves just as broken, instead of being silently repaired.

Zero has two spellings here, 0x0000 and 0xFFFF.  The sum of bytes that aren't all zero is 0xFFFF in
the RFC's arithmetic, so its complement, the field, is 0x0000: that is what these functions give.
(In UDP a field of zero means "no checksum"; that rule is udp.py's.)

    >>> header = bytes.fromhex("45000073000040004011 0000 c0a80001c0a800c7")
    >>> hex(checksum(header))
    '0xb861'
    >>> moved = header[:12] + bytes.fromhex("0a000001") + header[16:]
    >>> updated(0xB861, difference(header[12:16], moved[12:16])) == checksum(moved)
    True
"""

ONES = 0xFFFF


def checksum(data: bytes) -> int:
    """The Internet checksum of `data`, an odd last byte padded with zero (RFC 1071, section 1).

    Over data that holds a right checksum field the result is 0.
    """
    if len(data) % 2:
        data += b"\0"
    return _complement(int.from_bytes(data) % ONES, bool(data.strip(b"\0")))


def difference(old: bytes, new: bytes) -> int:
    """By how much the sum grows, modulo 65535, when `old` becomes `new` at an even offset.

    Both have the same, even length.
    """
    return (int.from_bytes(new) - int.from_bytes(old)) % ONES


def updated(field: int, delta: int) -> int:
    """The checksum field after the sum grew by `delta` (RFC 1624, equation 3)."""
    return ONES - total if (total := (delta - field) % ONES) else 0


def _complement(total: int, nonzero: bool) -> int:
    """The field for a sum modulo 65535, where 0 stands for 0xFFFF unless every byte was zero."""
    return ONES - (total or (ONES if nonzero else 0))
