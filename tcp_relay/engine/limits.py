"""What a relayed connection may take: bytes, and seconds.

Slow isn't dead.  A peer's kernel acknowledges every probe, whether its program reads or not, so
silence means a peer that is lost, and half a minute of it is enough.  A peer that answers and
takes nothing may have its reasons (a pause button, a disk that is full for a moment, a window that
stays closed until a sixteenth of a large buffer is free); it costs what is held for it, and is
given up after `stall`.

>>> [SessionLimits(stall=stall).silence for stall in (300.0, 10.0, 1.0)]
[25.0, 10.0, 4.0]
"""

from dataclasses import dataclass

from knet import relayoptions

SILENCE = 25.0
"""Seconds without an answer after which a peer is lost; with the looks, less than 30."""


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bytes, from 1 to relayoptions.MAX_HOLD, and seconds, above 0."""

    hold: int = relayoptions.HOLD
    """Bytes held per direction at most, and read at once.

    The more at once, the less often a process has to wake up: bulk gains up to here, and hardly
    beyond.  A thousand connections stalled both ways hold 1 GB.
    """

    stall: float = relayoptions.STALL
    """Seconds that held bytes may wait for a sink that answers, and takes none of them."""

    @property
    def silence(self) -> float:
        """Seconds that a peer may acknowledge nothing while bytes move, or a probe after that.

        No longer than a stall, and no longer than SILENCE; but four at least, which three probes
        take (sockets.probe_within), and no acknowledgement is delayed for (RFC 9293, section
        3.8.6.3).
        """
        return max(4.0, min(self.stall, SILENCE))

    @property
    def check(self) -> float:
        """Seconds between two looks at a connection that moves, or did a moment ago."""
        return min(self.silence / 4, 2.5)

    @property
    def deadline_check(self) -> float:
        """Seconds between two looks at a sink for which bytes are held."""
        return min(self.stall / 8, 2.0)

    half_close: float = relayoptions.HALF_CLOSE
    """Seconds of silence in the one direction that is left, after which both sides are reset."""

    connect: float = relayoptions.CONNECT
    """Seconds that a server has to accept: four SYNs, at 0, 1, 3 and 7 s (RFC 6298)."""

    drain: float = relayoptions.DRAIN
    """Seconds that running connections have to end after SIGTERM."""
