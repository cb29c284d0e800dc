"""What packets tell of flows: those that the worker saw, and those that the kernel did."""

from knet.endpoint import Proto
from knet.wire.tcp import ACK, SYN
from krelay.nat.flow import BUSY, DNS_PORT, Flow, Rewrite
from krelay.nat.store import FlowStore
from krelay.nat.tcpstate import Through
from krelay.steps import SENDERS, SIDES, Hook, Side, Step

MARKS, MARK_EVERY = 8, 0.025
"""Changes of DSCP of a connection that are followed at once, and seconds from one to the next."""


class FlowTracking:
    """Keeps what is known of flows up to date, and tells the observers."""

    def __init__(self, store: FlowStore) -> None:
        self._store = store
        self._sent = store.tables[Hook.POSTROUTING, Proto.TCP]

    def changed(self, flow: Flow) -> None:
        """What is known of a TCP connection has changed, and with it perhaps its state."""
        watched = flow.tracker.is_watched
        for rewrite in flow.rewrites.values():
            rewrite.watched = watched
        if flow.gport is None:
            self._store.admission.changed(flow)
        self._store.expiry.schedule(flow)
        self._store.observers.changed(flow)

    def counted(self, rewrite: Rewrite, now: float) -> None:
        """The worker has rewritten as many packets as this is to be told of (`tell_at`)."""
        rewrite.told()
        flow = rewrite.flow
        if flow.proto is _UDP and not flow.spoke_again:
            self._heard_datagrams(rewrite, now)
        if rewrite.packets >= BUSY:
            self._store.observers.changed(flow)

    def heard(self, rewrite: Rewrite, packets: int, size: int, now: float) -> None:
        """So many packets, and bytes in all, were rewritten elsewhere, the last just now.

        Those of a TCP connection's ends were neither SYN of a client, nor FIN nor RST.
        """
        rewrite.packets += packets
        rewrite.bytes += size
        rewrite.seen_at = max(rewrite.seen_at, now)
        flow = rewrite.flow
        tracker = flow.tracker
        if flow.proto is _UDP:
            self._heard_datagrams(rewrite, now)
            return
        if flow.id not in self._store.flows or isinstance(tracker, Through):
            return
        if flow.rewrites.get(rewrite.step) is not rewrite:
            flow.heard_at = max(flow.heard_at, now)  # of a leg that it has given up since
        before, reset = tracker.state, tracker.reset
        tracker.saw(SIDES[rewrite.step], ACK)
        tracker.reset = reset  # they came before the RST, which wasn't theirs
        if tracker.state is not before:
            self.changed(flow)

    def relayed(self, key: bytes, flags: int, number: int, now: float) -> None:
        """The kernel has rewritten this packet of tcp-relay's: a FIN or RST, or the SYN with which
        it begins its connection to the server.  `key` is its flow key, `number` its sequence
        number."""
        rewrite = self._sent.get(key)
        if rewrite is None or (side := SENDERS.get(rewrite.step)) is None:
            return
        flow, tracker = rewrite.flow, rewrite.flow.tracker
        if flags & (SYN | ACK) == SYN:
            if rewrite.step is Step.T3 and flow.leg is None and flow.closed_at is None:
                flow.leg = number
            return
        before, reset = tracker.state, tracker.reset
        tracker.saw(side, flags)
        if tracker.reset and not reset:
            flow.reset_at = now
        if tracker.state is not before or tracker.reset is not reset:
            self.changed(flow)

    def mark(self, rewrite: Rewrite, tos: int, now: float) -> None:
        """An end of terminated TCP has sent a packet with this DSCP, and not with the former.

        Observers are told of no more than MARKS changes at once, and one each MARK_EVERY: each
        costs as much as a new connection, and may be a forger's.  The next packet then tells again.
        """
        flow = rewrite.flow
        paid = max(flow.marked_at, now - MARKS * MARK_EVERY) + MARK_EVERY
        if paid > now:
            return
        flow.marked_at = paid
        observers = self._store.observers
        observers.before_mark(rewrite)
        rewrite.tos = tos
        observers.changed(flow)
        observers.marked(flow)

    def shook_hands(self, flow: Flow) -> None:
        """The kernel has the client's connection, which tcp-relay has accepted."""
        before = flow.tracker.state
        flow.tracker.client_acked = True
        if flow.tracker.state is not before:
            self.changed(flow)

    def _heard_datagrams(self, rewrite: Rewrite, now: float) -> None:
        """A flow of UDP is confirmed when its client speaks again after an answer."""
        flow = rewrite.flow
        if flow.spoke_again or flow.service.port == DNS_PORT:
            return
        side = SIDES.get(rewrite.step)
        if side is _SERVER and flow.answered_at is None:
            there = flow.by(_CLIENT)
            if there is not None and there.packets >= BUSY:
                # what the kernel has seen of it was before
                self._store.observers.before_expiry([flow])
            flow.answered_at = now
            if there is not None:
                there.tell_at = there.packets + 1
        elif side is _CLIENT and flow.answered_at is not None:
            flow.spoke_again = True
            if flow.id in self._store.flows:
                self._store.admission.confirmed(flow)


_UDP = Proto.UDP
_CLIENT, _SERVER = Side.CLIENT, Side.SERVER
# By these names: looking one up in its class takes ten times as long.
