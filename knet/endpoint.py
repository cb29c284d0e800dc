"""Endpoints, five-tuples and flow keys, as the packets read on the wire.

An address is kept packed, in network order, because that is how it arrives, how it is compared and
how it leaves; text is made only for people.  Nothing here knows what becomes of a flow: that is
the NAT table (krelay/nat).

A flow key is what a table finds packets by: source address, destination address, source port and
destination port, as they stand one after the other in a packet without IP options.  It is plain
bytes, since the packet path makes one for each packet.  Only the functions here know its layout;
they work for both address families, whose keys differ in length and so never meet in a table.

    >>> Endpoint.parse("10.0.0.1:40000")
    Endpoint(addr=b'\\n\\x00\\x00\\x01', port=40000)
    >>> client, service = Endpoint.parse("10.0.0.1:40000"), Endpoint.parse("192.168.0.2:80")
    >>> print(FiveTuple(Proto.TCP, client, service).reply())
    tcp 192.168.0.2:80 > 10.0.0.1:40000
"""

import struct
from enum import IntEnum, StrEnum
from functools import lru_cache
from ipaddress import ip_address
from typing import NamedTuple, Self


class Proto(IntEnum):
    """The transport protocols that are relayed, by IP protocol number (RFC 9293, RFC 768)."""

    TCP = 6
    UDP = 17

    def __str__(self) -> str:
        return self.name.lower()


class Source(StrEnum):
    """Whose address the server sees on a flow."""

    CLIENT = "client"
    RELAY = "relay"


class Endpoint(NamedTuple):
    """An address and a port."""

    addr: bytes  # packed, network order
    port: int

    @property
    def host(self) -> str:
        """The address as text."""
        return _text(self.addr)

    @property
    def wire(self) -> bytes:
        """Address and port as they stand in a packet, the address first."""
        return self.addr + self.port.to_bytes(2)

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @classmethod
    def of(cls, host: str, port: int) -> Self:
        """The endpoint of an address in text.  Raises ValueError for a bad address or port."""
        if not 0 <= port <= 0xFFFF:
            raise ValueError(f"{port} is not a port (0-65535)")
        return cls(_packed(host), port)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads `ADDRESS:PORT`.  Raises ValueError."""
        host, colon, port = text.rpartition(":")
        if not colon or not (port.isascii() and port.isdigit()):
            raise ValueError(f"{text!r} is not ADDRESS:PORT")
        return cls.of(host, int(port))


class FlowKey(NamedTuple):
    """What a flow key says, for all that isn't the packet path.

    >>> key = FlowKey(Endpoint.parse("10.0.0.1:4000"), Endpoint.parse("192.168.0.2:53")).pack()
    >>> print(*FlowKey.unpack(key).reverse())
    192.168.0.2:53 10.0.0.1:4000
    """

    src: Endpoint
    dst: Endpoint

    @classmethod
    def unpack(cls, key: bytes) -> Self:
        """Reads a flow key of either family."""
        src, dst, sport, dport = _LAYOUTS[len(key)].unpack(key)
        return cls(Endpoint(src, sport), Endpoint(dst, dport))

    def pack(self) -> bytes:
        """The flow key."""
        return flow_key(self.src, self.dst)

    def reverse(self) -> "FlowKey":
        """That of the packets which answer these."""
        return FlowKey(self.dst, self.src)


def flow_key(src: Endpoint, dst: Endpoint) -> bytes:
    """The key of packets from `src` to `dst`."""
    return src.addr + dst.addr + _PORTS(src.port, dst.port)


def reverse_key(key: bytes) -> bytes:
    """The key of the packets that answer those with this one."""
    if len(key) == _SIZE_V4:  # the common case, in the fewest steps
        src, dst, sport, dport = _UNPACK_V4(key)
        return _PACK_V4(dst, src, dport, sport)
    layout = _LAYOUTS[len(key)]
    src, dst, sport, dport = layout.unpack(key)
    return layout.pack(dst, src, dport, sport)


def key_src_end(key: bytes) -> Endpoint:
    """Source address and port."""
    src, _, sport, _ = _LAYOUTS[len(key)].unpack(key)
    return Endpoint(src, sport)


def key_dst_end(key: bytes) -> Endpoint:
    """Destination address and port."""
    _, dst, _, dport = _LAYOUTS[len(key)].unpack(key)
    return Endpoint(dst, dport)


def key_src(key: bytes) -> bytes:
    """The source address."""
    return key[: len(key) - 4 >> 1]


def key_dst(key: bytes) -> bytes:
    """The destination address."""
    return key[len(key) - 4 >> 1 : -4]


def key_addrs(key: bytes) -> bytes:
    """Both addresses, as they stand in a packet's IP header."""
    return key[:-4]


def key_ports(key: bytes) -> bytes:
    """Both ports, as they stand at the beginning of a packet's transport header."""
    return key[-4:]


def with_dst(key: bytes, addr: bytes) -> bytes:
    """The key with another destination address."""
    return key[: len(key) - 4 >> 1] + addr + key[-4:]


class FiveTuple(NamedTuple):
    """One direction of a conversation, as its packets read on the wire."""

    proto: Proto
    src: Endpoint
    dst: Endpoint

    def reply(self) -> "FiveTuple":
        """The opposite direction."""
        return FiveTuple(self.proto, self.dst, self.src)

    def __str__(self) -> str:
        return f"{self.proto} {self.src} > {self.dst}"


_PORTS = struct.Struct("!HH").pack
_LAYOUTS = {each.size: each for each in map(struct.Struct, ("!4s4sHH", "!16s16sHH"))}
_SIZE_V4 = 12
_UNPACK_V4, _PACK_V4 = _LAYOUTS[_SIZE_V4].unpack, _LAYOUTS[_SIZE_V4].pack

# A host talks about few addresses, again and again: for each connection tcp-relay reads four and
# writes three, which cost as much as all else that is done for it, and a trace shows four a packet.
_REMEMBERED = 4096


@lru_cache(_REMEMBERED)
def _packed(host: str) -> bytes:
    return ip_address(host).packed


@lru_cache(_REMEMBERED)
def _text(addr: bytes) -> str:
    return str(ip_address(addr))
