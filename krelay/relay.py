"""What krelay answers to tcp-relay: the relay socket's requests against the NAT table.

A row belongs to the connection of the relay socket on which it was opened or resumed; when that
connection is lost, tcp-relay has died (then the kernel resets the legs of its connections, and
these resets still pass through the rows) or it will be back and resume them.  After ORPHAN_GRACE,
rows that nobody has resumed are closed.

What tcp-relays report is summed up over all that there have been: who is gone has still counted, so
that totals never go backwards, but has nothing open.  A worker that comes back repeats what it has
told before, so the gone are remembered one by one; only of the oldest, which won't come back, no
more than their sum is kept.
"""

from collections import Counter
from collections.abc import Callable, Mapping

from krelay.admission import Refusal
from krelay.flow import Endpoint, Source
from krelay.nat import NatTable
from krelay.relaymsg import (
    COUNTERS,
    GAUGES,
    MAX_COUNTS,
    PORT_TAKEN,
    Abort,
    Answer,
    Close,
    Open,
    Opened,
    Refused,
    Report,
    Request,
    Resume,
    Resumed,
)
from krelay.row import Row, Step
from krelay.wire import ipv4

ORPHAN_GRACE = 5.0
"""Seconds."""

GONE_KEPT = 256
"""Workers that are remembered after they have gone; more than are ever connected at once."""

Send = Callable[[Answer], object]
"""Sends to one tcp-relay; also its identity."""


class Relays:
    """The tcp-relays that are connected, and which row is whose."""

    def __init__(self, nat: NatTable, source_for: Callable[[bytes], Source]) -> None:
        self.before_answers: Callable[[], object] = lambda: None
        """To be called when requests were handled, before their answers are sent."""
        self._nat = nat
        self._source_for = source_for
        self._owner: dict[int, Send] = {}
        self._orphans: list[tuple[float, list[int]]] = []
        self._reports = Reports()

    @property
    def totals(self) -> dict[str, int]:
        """As Reports.totals."""
        return self._reports.totals()

    def handle(self, request: Request, send: Send, now: float) -> Answer | None:
        """The answer to a request that came from there."""
        match request:
            case Open() | Resume() if not _is_ipv4(request):
                return Refused(request.id, "only IPv4 addresses are relayed")
            case Open():
                return self._open(request, send, now)
            case Resume():
                return self._resume(request, send, now)
            case Close(relay=relay):
                if (row := self._nat.of_relay_port(relay)) is not None:
                    self._owner.pop(row.id, None)
                    self._nat.close(row, now)
                return None
            case Report():
                self._reports.told(request, send)
                return None

    def lost(self, send: Send, now: float) -> None:
        """That connection is gone."""
        self._reports.lost(send)
        rows = [row_id for row_id, owner in self._owner.items() if owner is send]
        for row_id in rows:
            del self._owner[row_id]
        if rows:
            self._orphans.append((now + ORPHAN_GRACE, rows))

    def abort(self, row: Row, now: float) -> None:
        """Has both legs of a connection reset; its row ends when that is done.

        A row whose client hasn't completed its handshake has no legs, and ends at once.
        """
        self._nat.on_late([row])
        row.abort_asked = True
        owner = self._owner.get(row.id)
        if owner is not None and row.relay is not None:
            owner(Abort(row.relay))
        elif row.relay is not None:
            self._nat.close(row, now)
        elif not row.tracker.client_acked:
            self._nat.end(row)  # tcp-relay doesn't know of it yet, and never will
        # Without a relay port tcp-relay hasn't asked yet: `open` will be refused, which resets
        # the client through this row.

    def on_time(self, now: float) -> None:
        """Closes what nobody has come back for, and forgets rows that are no more."""
        while self._orphans and self._orphans[0][0] <= now:
            for row_id in self._orphans.pop(0)[1]:
                row = self._nat.get(row_id)
                if row is not None and row_id not in self._owner:
                    self._nat.close(row, now)
        if len(self._owner) > len(self._nat):  # some have ended; not looked for every second
            for row_id in [i for i in self._owner if self._nat.get(i) is None]:
                del self._owner[row_id]

    def _open(self, request: Open, send: Send, now: float) -> Answer:
        row = self._nat.accepted(request.client, request.gport)
        if row is None:
            return Refused(request.id, "no row for this client")
        row.accepted = True
        if row.abort_asked or row.closed_at is not None:
            self._nat.close(row, now)
            return Refused(request.id, "the row was ended")
        try:
            self._nat.attach(row, request.relay, now)
        except Refusal:
            self._nat.detach(row)  # it may have had another port before
            return Refused(request.id, PORT_TAKEN)
        self._owner[row.id] = send
        origin = row.client if row.client != request.client else None
        return Opened(request.id, row.server, row.source, origin)

    def _resume(self, request: Resume, send: Send, now: float) -> Answer:
        known = self._nat.of_relay_port(request.relay)
        if known is not None and known.inside == request.client and known.closed_at is None:
            self._owner[known.id] = send  # the socket was lost, not the table
            return Resumed(request.id)
        other = self._nat.accepted(request.client, request.gport)
        if other is not None and other.closed_at is None:
            return Refused(request.id, "can't be resumed: another row has this client")
        row: Row | None = None
        service = request.service or Endpoint(request.relay.addr, request.server.port)
        try:
            row = self._nat.open_tcp(
                request.origin or request.client,
                service,
                request.server,
                request.source or self._source_for(request.client.addr),
                request.gport,
                now,
                inside=request.client,
            )
            self._nat.attach(row, request.relay, now)
        except Refusal as refusal:
            if row is not None:
                self._nat.end(row)
            return Refused(request.id, f"can't be resumed: {refusal.reason}")
        row.accepted = True
        row.tracker.resumed()
        for step in (Step.T1, Step.T2, Step.T3, Step.T4):
            row.rewrites[step].watched = False
        self._nat.schedule(row)
        self._owner[row.id] = send
        return Resumed(request.id)


class Reports:
    """The last report of each worker, and what they come to together."""

    def __init__(self) -> None:
        self._here: dict[str, tuple[Send, Mapping[str, int]]] = {}
        self._gone: dict[str, Mapping[str, int]] = {}  # in the order they went; without gauges
        self._forgotten: Counter[str] = Counter()

    def told(self, report: Report, send: Send) -> None:
        """Takes the place of what this worker, or another over this connection, told before.

        A worker may be back before its old connection is known to be lost.
        """
        self._part(send)
        self._gone.pop(report.worker, None)
        self._here[report.worker] = (send, report.counts)
        self._forget_oldest()

    def lost(self, send: Send) -> None:
        """That connection is gone: its worker has nothing open, what it counted stays."""
        self._part(send)
        self._forget_oldest()

    def totals(self) -> dict[str, int]:
        """The sum of all by name: GAUGES and COUNTERS, 0 if never told, then other names sorted."""
        total = self._forgotten.copy()
        for counts in self._gone.values():
            total.update(counts)
        for _, counts in self._here.values():
            total.update(counts)
        known = (*GAUGES, *COUNTERS)
        return {name: total[name] for name in (*known, *sorted(total.keys() - {*known}))}

    def _part(self, send: Send) -> None:
        for worker in [worker for worker, (owner, _) in self._here.items() if owner is send]:
            _, counts = self._here.pop(worker)
            self._gone[worker] = {name: n for name, n in counts.items() if name not in GAUGES}

    def _forget_oldest(self) -> None:
        while len(self._gone) > GONE_KEPT:
            counts = self._gone.pop(next(iter(self._gone)))
            for name, number in counts.items():
                if name in self._forgotten or len(self._forgotten) < MAX_COUNTS:
                    self._forgotten[name] += number


def _is_ipv4(request: Open | Resume) -> bool:
    ends = [request.client, request.relay, request.service]
    if isinstance(request, Resume):
        ends += [request.server, request.origin]
    return all(len(end.addr) == ipv4.ADDRESS for end in ends if end)
