"""What a relayed connection may take: bytes, and seconds.

>>> Limits().stall
10.0
"""

from dataclasses import dataclass

MAX_HOLD = 64 << 20
"""Bytes; what is read at once is as long as what may be held."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes, from 1 to MAX_HOLD, and seconds, above 0."""

    hold: int = 512 * 1024
    """Bytes held per direction at most, and read at once.

    The more at once, the less often anybody has to wake up: bulk gains up to here, and hardly
    beyond.  A thousand connections stalled both ways hold 1 GB.
    """

    stall: float = 10.0
    """Seconds that held bytes may wait for a sink that takes none of them."""

    @property
    def silence(self) -> float:
        """Seconds that a server may acknowledge nothing while bytes move, or a probe after that.

        As long as a stall; but four at least, which three probes take (sockets.probe_within), and
        no acknowledgement is delayed for (RFC 9293, section 3.8.6.3).
        """
        return max(self.stall, 4.0)

    half_close: float = 3600.0
    """Seconds of silence in the one direction that is left, after which nobody waits any more."""

    connect: float = 10.0
    """Seconds that a server has to accept: four SYNs, at 0, 1, 3 and 7 s (RFC 6298)."""

    drain: float = 30.0
    """Seconds that running connections have to end after SIGTERM."""
