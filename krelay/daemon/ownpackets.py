"""Packets that krelay itself sends, RSTs and ICMP errors, and that rules of this host stop."""

from knet.log import Log, Throttle
from knet.rawsocket import RawSender

_log = Log("relaying")


class OwnPackets:
    """How many were stopped since krelay began, by what the `sender` has met."""

    def __init__(self, sender: RawSender) -> None:
        self._sender = sender
        self._warning = Throttle()
        self._told = 0

    @property
    def stopped(self) -> int:
        """How many."""
        return self._sender.stopped

    def __str__(self) -> str:
        """`ok`, or what is wrong."""
        if not self.stopped:
            return "ok"
        return f"{self.stopped} stopped by rules of this host; krelay doctor names them"

    def warn(self, now: float) -> None:
        """Warns if more were stopped since the last time."""
        stopped = self.stopped - self._told
        if stopped and self._warning.admit(now) is not None:
            _log.warning(
                "rules of this host stop krelay's own packets: refused clients get no answer",
                packets=stopped,
                fix="krelay doctor",
            )
            self._told += stopped
