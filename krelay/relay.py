"""What krelay answers to tcp-relay: the relay socket's requests against the NAT table.

A row belongs to the connection of the relay socket on which it was opened or resumed; when that
connection is lost, tcp-relay has died (then the kernel resets the legs of its connections, and
these resets still pass through the rows) or it will be back and resume them.  After ORPHAN_GRACE,
rows that nobody has resumed are closed.
"""

from collections.abc import Callable

from krelay.flow import Endpoint, Source
from krelay.nat import NatTable, Refusal
from krelay.relaymsg import (
    PORT_TAKEN,
    Abort,
    Answer,
    Close,
    Open,
    Opened,
    Refused,
    Request,
    Resume,
    Resumed,
)
from krelay.row import Row, Step
from krelay.wire import ipv4

ORPHAN_GRACE = 5.0
"""Seconds."""

Send = Callable[[Answer], object]
"""Sends to one tcp-relay; also its identity."""


class Relays:
    """The tcp-relays that are connected, and which row is whose."""

    def __init__(self, nat: NatTable, source_for: Callable[[bytes], Source]) -> None:
        self._nat = nat
        self._source_for = source_for
        self._owner: dict[int, Send] = {}
        self._orphans: list[tuple[float, list[int]]] = []

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

    def lost(self, send: Send, now: float) -> None:
        """That connection is gone."""
        rows = [row_id for row_id, owner in self._owner.items() if owner is send]
        for row_id in rows:
            del self._owner[row_id]
        if rows:
            self._orphans.append((now + ORPHAN_GRACE, rows))

    def abort(self, row: Row, now: float) -> None:
        """Has both legs of a connection reset; its row ends when that is done."""
        row.abort_asked = True
        owner = self._owner.get(row.id)
        if owner is not None and row.relay is not None:
            owner(Abort(row.relay))
        elif row.relay is not None:
            self._nat.close(row, now)
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
        if row.abort_asked or row.closed_at is not None:
            self._nat.close(row, now)
            return Refused(request.id, "the row was ended")
        try:
            self._nat.attach(row, request.relay, now)
        except Refusal:
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
        row.tracker.resumed()
        for step in (Step.T1, Step.T2, Step.T3, Step.T4):
            row.rewrites[step].watched = False
        self._nat.schedule(row)
        self._owner[row.id] = send
        return Resumed(request.id)


def _is_ipv4(request: Open | Resume) -> bool:
    ends = [request.client, request.relay, request.service]
    if isinstance(request, Resume):
        ends += [request.server, request.origin]
    return all(len(end.addr) == ipv4.ADDRESS for end in ends if end)
