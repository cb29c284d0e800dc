"""Wire formats: how the bytes of a packet are laid out, and how they are changed.  Pure.

Constants stand beside the RFC that fixes them; there is one reader and one writer a format, and one
exception, BadPacket, for bytes that are not what they claim to be.

checksum  the Internet checksum (RFC 1071), whole and updated (RFC 1624)
ipv4      headers, fragments, and one address put in another's place
tcp       ports, flags, and segments of our own
udp       datagrams
icmp      errors that quote a packet, echo requests
pcapng    capture files
"""


class BadPacket(ValueError):
    """Bytes that are no packet of the format.  `reason` is a word for counters."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
