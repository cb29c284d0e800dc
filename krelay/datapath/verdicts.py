"""Verdicts as the kernel takes them, many in one message to it.

The kernel takes any number of netlink messages in one send, and handles them in order
(netlink_rcv_skb, net/netlink/af_netlink.c).  A send for every packet would be a third of the whole
cost of a packet.  What stands around a packet's number and its new bytes depends on its size
alone, so it is made once for each size.

    nlmsghdr, nfgenmsg, attribute VERDICT_HDR: verdict, packet id [, attribute PAYLOAD: the packet]

Numbers of nlmsghdr and attributes are the host's, those of netfilter the network's
(linux/netfilter/nfnetlink_queue.h).
"""

import struct

ROOM = 64 << 10
"""Bytes gathered before they are to be sent; with one more packet of 64 KB on top it is still less
than a socket takes at once by default (net.core.wmem_default)."""

_MSG_VERDICT = 3 << 8 | 1
_REQUEST = 1
_ATTR_VERDICT, _ATTR_PAYLOAD = 2, 10
_DROP, _ACCEPT = 0, 1
_COMMON = 2048  # bytes; frames of larger packets are made each time, or there might be 65,536
_FRAME = 36  # nlmsghdr 16, nfgenmsg 4, verdict 12, head of the payload 4


class Verdicts:
    """The verdicts given so far on packets of one queue, in order, as `take` hands them out."""

    def __init__(self, queue: int) -> None:
        self.size = 0
        """Bytes gathered."""
        self._parts: list[bytes] = []
        self._queue = queue
        self._by_size: dict[int, tuple[bytes, bytes, bytes]] = {}
        self._accept = self._head(_FRAME - 4, _ACCEPT)
        self._drop = self._head(_FRAME - 4, _DROP)

    def replace(self, number: int, packet: bytes) -> None:
        """The packet with this number goes on as these bytes, of which there is at least one."""
        size = len(packet)
        frame = self._by_size.get(size)
        if frame is None:
            frame = self._frame(size)
            if size <= _COMMON:
                self._by_size[size] = frame
        head, middle, padding = frame
        self._parts += (head, number.to_bytes(4), middle, packet, padding)
        self.size += size + _FRAME

    def accept(self, number: int) -> None:
        """It goes on as it is."""
        self._parts += (self._accept, number.to_bytes(4))
        self.size += _FRAME - 4

    def drop(self, number: int) -> None:
        """It goes nowhere."""
        self._parts += (self._drop, number.to_bytes(4))
        self.size += _FRAME - 4

    def take(self) -> bytes:
        """All of them, for the kernel; none are left.  Empty if there are none."""
        message = b"".join(self._parts)
        self._parts.clear()
        self.size = 0
        return message

    def _frame(self, size: int) -> tuple[bytes, bytes, bytes]:
        padding = bytes(-size % 4)
        head = self._head(_FRAME + size + len(padding), _ACCEPT)
        return head, struct.pack("=HH", 4 + size, _ATTR_PAYLOAD), padding

    def _head(self, length: int, verdict: int) -> bytes:
        return b"".join(
            (
                struct.pack("=IHHII", length, _MSG_VERDICT, _REQUEST, 0, 0),
                struct.pack("!BBH", 0, 0, self._queue),
                struct.pack("=HH", 12, _ATTR_VERDICT),
                struct.pack("!I", verdict),
            )
        )
