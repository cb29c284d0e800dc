"""Clients' own conversations with a server, seen passing by, so that no flow takes their ports."""

from knet.endpoint import Proto
from krelay.nat.flow import Timeouts

MOST = 1 << 16
"""Conversations of each protocol that are remembered."""


class DirectFlows:
    """They by protocol and flow key, the least recently seen first."""

    def __init__(self, most: int = MOST) -> None:
        self._seen: dict[Proto, dict[bytes, float]] = {proto: {} for proto in Proto}
        self._most = most

    def saw(self, proto: Proto, key: bytes, now: float) -> None:
        """A packet of this conversation came past."""
        seen = self._seen[proto]
        seen.pop(key, None)
        seen[key] = now
        if len(seen) > self._most:
            del seen[next(iter(seen))]

    def __contains__(self, conversation: tuple[Proto, bytes]) -> bool:
        return conversation[1] in self._seen[conversation[0]]

    def of(self, proto: Proto) -> list[bytes]:
        """Those of this protocol, by flow key."""
        return list(self._seen[proto])

    def expire(self, now: float, timeouts: Timeouts) -> None:
        """Forgets those that were silent for as long as a flow may be."""
        for proto, timeout in ((Proto.TCP, timeouts.tcp_established), (Proto.UDP, timeouts.udp)):
            seen = self._seen[proto]
            while seen and seen[oldest := next(iter(seen))] < now - timeout:
                del seen[oldest]

    def clear(self) -> None:
        """Forgets all."""
        for seen in self._seen.values():
            seen.clear()
