"""How often something may happen, and to whom it was refused.  Pure.

Each is bounded itself, whatever clients there are or are said to be: the source of a flood is
mostly forged, and differs from packet to packet.

    RateLimiter        at most so many a second: our own answers to what is refused
    PerClientLimiter   the same for each client: how many flows it may begin
    TopRefusedClients  who was refused most, and why

Times are seconds that the caller passes in.
"""

_SLACK = 1e-6
"""Of a gap between two events: what sums of fractions are off by is less."""


class RateLimiter:
    """At most `rate` a second, and `burst` at once (the generic cell rate algorithm, ITU I.371)."""

    def __init__(self, rate: float, burst: int) -> None:
        self._gap = 1 / rate
        self._ahead = (burst - 1 + _SLACK) * self._gap
        self._paid_until = 0.0

    def admits(self, now: float) -> bool:
        """Whether it may happen now; if so, it counts as having happened."""
        if self._paid_until > now + self._ahead:
            return False
        self._paid_until = max(self._paid_until, now) + self._gap
        return True


class PerClientLimiter:
    """How many flows each client may begin: `rate` at once, and `rate` a second from then on."""

    def __init__(self) -> None:
        self._paid_until: dict[bytes, float] = {}  # only of those who began one lately

    def admits(self, client: bytes, rate: int, now: float) -> bool:
        """Whether this client may begin one more now."""
        return self._paid_until.get(client, now) <= now + (rate - 1 + _SLACK) / rate

    def began(self, client: bytes, rate: int, now: float) -> None:
        """It did."""
        self._paid_until[client] = max(self._paid_until.pop(client, now), now) + 1 / rate

    def forget(self, now: float) -> None:
        """Lets go of the clients who may begin `rate` flows again."""
        paid = self._paid_until
        while paid and paid[client := next(iter(paid))] <= now:
            del paid[client]


class TopRefusedClients:
    """How often each client was refused, by reason; of many clients, those who were most often.

    Holds `most` counts at most (J. Misra, D. Gries, "Finding repeated elements", 1982): where one
    more would be needed, each is lowered by one, and those at zero go.  So a count is exact as long
    as there was room for all, and otherwise too low by at most a `most`-th of all refusals: a
    client that makes up more than that is always in it, however many addresses are forged.
    """

    def __init__(self, most: int = 512) -> None:
        self._most = most
        self._counts: dict[tuple[bytes, str], int] = {}

    def saw(self, client: bytes, reason: str) -> None:
        """This client was refused for this reason."""
        counts = self._counts
        at = (client, reason)
        if at in counts:
            counts[at] += 1
        elif len(counts) < self._most:
            counts[at] = 1
        else:
            self._counts = {each: n - 1 for each, n in counts.items() if n > 1}

    def top(self, most: int = 10) -> dict[bytes, dict[str, int]]:
        """The clients refused most often, first the one with most; their refusals by reason."""
        by_client: dict[bytes, dict[str, int]] = {}
        for (client, reason), count in self._counts.items():
            by_client.setdefault(client, {})[reason] = count
        ranked = sorted(by_client.items(), key=lambda item: (-sum(item[1].values()), item[0]))
        return dict(ranked[:most])
