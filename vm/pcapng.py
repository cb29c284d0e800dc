"""A capture file that Wireshark and tcpdump read: pcapng, one interface, Ethernet.

The format is draft-ietf-opsawg-pcapng: blocks of 32-bit words, each with its length at both ends.
Times are nanoseconds since 1970, and each frame says which way it went.
"""

import struct

_SECTION, _INTERFACE, _PACKET = 0x0A0D0D0A, 1, 6
_BYTE_ORDER = 0x1A2B3C4D
_ETHERNET = 1  # LINKTYPE_ETHERNET
_IF_NAME, _IF_TSRESOL, _EPB_FLAGS = 2, 9, 2
_INBOUND, _OUTBOUND = 1, 2
_END = b"\0\0\0\0"  # opt_endofopt


def header(interface: str) -> bytes:
    """How the file begins; `interface` is what a reader calls the place of the capture."""
    section = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, -1)
    options = _option(_IF_NAME, interface.encode()) + _option(_IF_TSRESOL, b"\x09") + _END
    return _block(_SECTION, section) + _block(
        _INTERFACE, struct.pack("<HHI", _ETHERNET, 0, 0) + options
    )


def frame(data: bytes, nanoseconds: int, *, outbound: bool) -> bytes:
    """A frame, seen at that time."""
    high, low = divmod(nanoseconds, 1 << 32)
    head = struct.pack("<IIIII", 0, high, low, len(data), len(data))
    flags = _option(_EPB_FLAGS, struct.pack("<I", _OUTBOUND if outbound else _INBOUND))
    return _block(_PACKET, head + _padded(data) + flags + _END)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + _padded(value)


def _block(kind: int, body: bytes) -> bytes:
    length = struct.pack("<I", len(body) + 12)
    return struct.pack("<I", kind) + length + body + length


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
