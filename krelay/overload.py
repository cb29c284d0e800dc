"""What keeps the relay usable while more is asked of it than it has: by one client, or by a flood.

Four small things, each bounded itself, whatever clients there are or are said to be (the source of
a flood is mostly forged, and differs from packet to packet):

    Pace      how often something may happen: our own answers to what is refused
    NewFlows  the same for each client: how many rows it may begin a second
    Refused   who was refused most, and why
    Spare     rows that nobody would miss, oldest first: at a limit one of them makes room

Times are seconds that the caller passes in.
"""

from collections.abc import Callable

from krelay.row import Row

EARLY = 2.0
"""Seconds of idleness before a row may be ended to make room: a handshake, an answer or the last
packets of a connection that are still on their way take less.  So a flood must bring limits/flows
rows within two seconds before a genuine client is refused, and two seconds after it everybody is
served again."""

_SLACK = 1e-6
"""Of a gap between two events: what sums of fractions are off by is less."""

LOOKS = 256
"""Rows looked at for one new flow, at most; what is left is for the next."""


class Pace:
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


class NewFlows:
    """How many rows each client may begin: `rate` at once, and `rate` a second from then on."""

    def __init__(self) -> None:
        self._paid_until: dict[bytes, float] = {}  # only of those who began one lately

    def admits(self, client: bytes, rate: int, now: float) -> bool:
        """Whether this client may begin one more now."""
        return self._paid_until.get(client, now) <= now + (rate - 1 + _SLACK) / rate

    def began(self, client: bytes, rate: int, now: float) -> None:
        """It did."""
        self._paid_until[client] = max(self._paid_until.pop(client, now), now) + 1 / rate

    def forget(self, now: float) -> None:
        """Lets go of the clients who may begin `rate` rows again."""
        paid = self._paid_until
        while paid and paid[client := next(iter(paid))] <= now:
            del paid[client]


class Refused:
    """How often each client was refused, by reason; of many clients, those who were most often.

    Holds `most` counts at most (J. Misra, D. Gries, "Finding repeated elements", 1982): where one
    more would be needed, each is lowered by one, and those at zero go.  So a count is exact as long
    as there was room for all, and otherwise too low by at most a `most`-th of all refusals: who
    makes up more than that is always in it, however many addresses are forged.
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


class Spare:
    """Rows that may be ended to make room for others, in the order in which they were entered.

    `may_go` tells whether a row may be ended as it stands; `is_settled` whether it needn't be asked
    again.
    """

    def __init__(self, may_go: Callable[[Row], bool], is_settled: Callable[[Row], bool]) -> None:
        self.may_go = may_go
        self._is_settled = is_settled
        self._since: dict[Row, float] = {}  # when it was entered, or looked at last
        self._of: dict[bytes, dict[Row, float]] = {}  # the same rows by client

    def __len__(self) -> int:
        return len(self._since)

    def add(self, row: Row, now: float) -> None:
        """A row that isn't in yet."""
        self._since[row] = now
        of_client = self._of.get(row.client.addr)
        if of_client is None:
            of_client = self._of[row.client.addr] = {}
        of_client[row] = now

    def discard(self, row: Row) -> None:
        """It has ended, or makes no room any more.  Harmless if it isn't in."""
        if self._since.pop(row, None) is not None:
            of_client = self._of[row.client.addr]
            del of_client[row]
            if not of_client:
                del self._of[row.client.addr]

    def oldest(self, now: float, client: bytes | None = None) -> Row | None:
        """The oldest row, of this client if one is named, that may be ended now; it is still in.

        Rows that are settled leave; others that may not be ended go to the end.
        """
        since = self._since if client is None else self._of.get(client, {})
        for _ in range(LOOKS):
            row = next(iter(since), None)
            if row is None or since[row] > now - EARLY:
                return None
            if self._is_settled(row):
                self.discard(row)
            elif self.may_go(row) and row.quiet_since <= now - EARLY:
                return row
            else:
                del since[row]
                since[row] = now
        return None
