"""Endpoints and flows: who talks to whom, as the packets read on the wire.

An address is kept packed, in network order, because that is how it arrives, how it is compared and
how it leaves; text is made only for people.  Nothing here knows which address family that is, or
what becomes of a flow: that is nat.py.

    >>> Endpoint.parse("10.0.0.1:40000")
    Endpoint(addr=b'\\n\\x00\\x00\\x01', port=40000)
    >>> client, service = Endpoint.parse("10.0.0.1:40000"), Endpoint.parse("192.168.0.2:80")
    >>> print(FiveTuple(Proto.TCP, client, service).reply())
    tcp 192.168.0.2:80 > 10.0.0.1:40000
"""

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


# A host talks about few addresses, again and again: for each connection tcp-relay reads four and
# writes three, which cost as much as all else that is done for it, and a trace shows four a packet.
_REMEMBERED = 4096


@lru_cache(_REMEMBERED)
def _packed(host: str) -> bytes:
    return ip_address(host).packed


@lru_cache(_REMEMBERED)
def _text(addr: bytes) -> str:
    return str(ip_address(addr))
