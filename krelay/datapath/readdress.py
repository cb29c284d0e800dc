"""A packet with other addresses and ports, whatever its header: the general way.

`Worker.handle` has the same written out for packets with a plain header.
"""

from knet.endpoint import Endpoint, FiveTuple, Proto, key_addrs, key_ports
from knet.wire import BadPacket, ipv4, tcp, udp
from knet.wire.checksum import updated
from krelay.nat.flow import Rewrite


def flow_of(packet: bytes) -> FiveTuple:
    """The flow of a packet that `handle` would rewrite.  Raises BadPacket for others."""
    header = ipv4.parse(packet)
    at = header.length
    if header.proto not in (Proto.TCP, Proto.UDP) or header.total < at + udp.HEADER:
        raise BadPacket("other_protocol")
    return FiveTuple(
        Proto(header.proto),
        Endpoint(header.src, int.from_bytes(packet[at : at + 2])),
        Endpoint(header.dst, int.from_bytes(packet[at + 2 : at + 4])),
    )


def readdressed(packet: bytes, header: ipv4.Header, rewrite: Rewrite) -> bytes:
    """The packet with other addresses and ports and both checksums updated; `header` is its own."""
    at = header.length
    new = rewrite.new
    check = updated(int.from_bytes(packet[ipv4.CHECK]), rewrite.ip_delta)
    where = at + (tcp.CHECK if header.proto == Proto.TCP else udp.CHECK)
    field = int.from_bytes(packet[where : where + 2])
    update = updated if header.proto == Proto.TCP else udp.updated_check
    return b"".join(
        (
            packet[: ipv4.CHECK.start],
            check.to_bytes(2),
            key_addrs(new),
            packet[ipv4.ADDRESSES.stop : at],
            key_ports(new),
            packet[at + 4 : where],
            update(field, rewrite.l4_delta).to_bytes(2),
            packet[where + 2 :],
        )
    )
