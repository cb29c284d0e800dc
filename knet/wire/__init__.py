"""Wire formats: how the bytes of a packet are laid out, and how they are changed.  Pure.

Constants stand beside the RFC that fixes them; there is one reader and one writer a format, and one
exception, BadPacket, for bytes that are not what they claim to be.
"""


class BadPacket(ValueError):
    """Bytes that are no packet of the format.  `reason` is a word for counters."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
