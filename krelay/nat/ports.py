"""The relay's own UDP ports, of which flows with source=relay have one each.

No port is ever two flows', whatever servers they lead to (RFC 4787, REQ-3).  A flow gets the port
its client has if that is free; otherwise one at random of the same range, below 1024 or not
(REQ-3a), and parity (REQ-4), then of the other parity.  A client from below 1024 is served from
above rather than not at all; the reverse would give away ports that mean privilege.

The free ports of each kind stand in an array without gaps, so that the last free port is found as
fast as the first, and that there is none is known at once.

    >>> ports = FreePorts()
    >>> ports.take(4000), ports.take(4000)
    (True, False)
    >>> ports.near(4000, lambda port: True, Random(1)) % 2
    0
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random

FIRST_HIGH = 1024
TRIES = 64
"""Ports of a kind that are tried, where free ports may be unfit for a reason of the caller's."""


class FreePorts:
    """The free ports among 1 to 65535."""

    def __init__(self) -> None:
        self._kinds = [
            array("H", range(low, high, 2))
            for first, high in ((1, FIRST_HIGH), (FIRST_HIGH, 0x10000))
            for low in (first + first % 2, first + 1 - first % 2)  # the even ones, then the odd
        ]
        self._place = array("H", bytes(2 * 0x10000))
        for kind in self._kinds:
            for place, port in enumerate(kind):
                self._place[port] = place

    def __len__(self) -> int:
        return sum(map(len, self._kinds))

    def __contains__(self, port: int) -> bool:
        kind, place = self._kind(port), self._place[port]
        return place < len(kind) and kind[place] == port

    def take(self, port: int) -> bool:
        """Takes it for one flow alone; False if it is taken already."""
        if port not in self:
            return False
        kind, place = self._kind(port), self._place[port]
        last = kind.pop()
        if last != port:
            kind[place] = last
            self._place[last] = place
        return True

    def give_back(self, port: int) -> None:
        """It is free again.  It must have been taken."""
        kind = self._kind(port)
        self._place[port] = len(kind)
        kind.append(port)

    def near(self, wanted: int, fits: Callable[[int], bool], rng: Random) -> int | None:
        """A free port that fits and is as much like the wanted one as there is."""
        high, odd = wanted >= FIRST_HIGH, wanted % 2
        for each in self._orders(high, odd):
            kind = self._kinds[each]
            for _ in range(min(TRIES, len(kind))):
                port = kind[rng.randrange(len(kind))]
                if fits(port):
                    return port
        return None

    def _kind(self, port: int) -> "array[int]":
        return self._kinds[2 * (port >= FIRST_HIGH) + port % 2]

    @staticmethod
    def _orders(high: bool, odd: int) -> Iterator[int]:
        for above in (True,) if high else (False, True):
            for parity in (odd, 1 - odd):
                yield 2 * above + parity


class RelayPorts:
    """The ports that flows have, by the relay's address: none is made before it is used."""

    def __init__(self, rng: Random) -> None:
        self._free: dict[bytes, FreePorts] = {}
        self._shared = Counter[tuple[bytes, int]]()
        """Those that have more than one flow: how many more."""
        self._rng = rng
        self._taken = 0

    def __len__(self) -> int:
        """Ports that flows have."""
        return self._taken

    def take(self, addr: bytes, wanted: int, fits: Callable[[int], bool]) -> int | None:
        """The wanted port of this address, or one like it, for a flow; None if there is none."""
        free = self._free.get(addr)
        if free is None:
            free = self._free[addr] = FreePorts()
        port: int | None = wanted
        if not (wanted and wanted in free and fits(wanted)):
            port = free.near(wanted, fits, self._rng)
        if port is not None:
            free.take(port)
            self._taken += 1
        return port

    def share(self, addr: bytes, port: int) -> None:
        """One flow more has this port, which a flow has: both are of one client's exchange."""
        self._shared[addr, port] += 1

    def give_back(self, addr: bytes, port: int) -> None:
        """The flow has ended, or one of those that share the port."""
        if others := self._shared.pop((addr, port), 0):
            if others > 1:
                self._shared[addr, port] = others - 1
            return
        self._free[addr].give_back(port)
        self._taken -= 1
