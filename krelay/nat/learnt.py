"""Flows that the kernel has learnt by itself: a question each, and mostly its answer.

A resolver asks each question from a port of its own, so half of its packets begin a flow.  A visit
to the worker for each, and a row, would cost more than all else that a relay does for it.  So for
these services (ruleset.py) the kernel decides by itself what can only be decided one way, relays
question and answer, and sends copies of both packets' heads.  From them this table is filled, some
milliseconds later (nat.py).  It holds as little as may be, and makes a whole row of it only when
somebody wants to see it, or when a packet comes that the worker must decide about.
"""

import struct
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping
from itertools import chain, islice
from typing import NamedTuple

from knet.netlink.nflog import Copy
from knet.timerwheel import Wheel
from krelay.nat.flow import Hook

_SEARCHED = 64
"""Flows, the oldest, among which one of a client's is looked for."""
_FETCHED = 1024
"""Of the oldest, at a time."""


class LearntFlow:
    """One flow: the question's twelve bytes of addresses and ports are its key in the table."""

    __slots__ = (
        "answered",
        "answered_bytes",
        "asked",
        "asked_bytes",
        "began_at",
        "heard_at",
        "id",
        "server",
    )

    def __init__(self, row_id: int, server: bytes, now: float, asked: int, size: int) -> None:
        self.id = row_id
        self.server = server
        """The address that the question went on to."""
        self.began_at = self.heard_at = now
        self.asked = asked
        self.asked_bytes = size
        self.answered = self.answered_bytes = 0


class Beginning(NamedTuple):
    """What flows that begin together have in common, and how many may."""

    until: float
    """When they are over if nothing more is heard of them."""
    room: int
    """How many there may be of them."""
    per_client: int
    """How many a client may have of all."""
    displaces: bool
    """Whether the oldest of all, or of its client, goes for one that finds no room."""


class LearntFlows:
    """They that haven't been silent for so many seconds, the oldest first."""

    def __init__(
        self,
        ids: Iterator[int],
        rows: Container[bytes],
        of_others: Mapping[bytes, int],
        busy: int,
        on_busy: Callable[[bytes], object],
    ) -> None:
        """`ids`: a number for each.  `rows`: the questions of which there are rows instead.

        `of_others`: how many rows a client has beside these flows.  `on_busy` is called for the
        question of a flow that has been asked `busy` times.
        """
        self.addresses: frozenset[bytes] = frozenset()
        """The addresses of this host that were asked."""
        self.displaced = 0
        """Those taken out to make room."""
        self._ids = ids
        self._rows = rows
        self._of_others = of_others
        self._busy = busy
        self._on_busy = on_busy
        self._flows: dict[bytes, LearntFlow] = {}
        self._oldest = deque[tuple[bytes, LearntFlow]]()
        """Some that were the first when last looked for; gone ones may be among them."""
        self._per_client: Counter[bytes] = Counter()
        self._due = Wheel[list[bytes]]()
        self._server = b""

    def __len__(self) -> int:
        return len(self._flows)

    def __iter__(self) -> Iterator[tuple[bytes, LearntFlow]]:
        return iter(list(self._flows.items()))

    def learns(self, addresses: frozenset[bytes], server: bytes) -> None:
        """From now on the kernel learns flows to these addresses of this host, for that server."""
        self.addresses |= addresses  # what was learnt of others still lives
        self._server = server

    def get(self, question: bytes) -> LearntFlow | None:
        """The flow that begins with such a packet."""
        return self._flows.get(question)

    def asked_as(self, outside: bytes) -> bytes | None:
        """The question of the flow between these two ends, to whichever address of this host."""
        flows = self._flows
        if not flows:
            return None
        found = (outside[:4] + address + outside[8:] for address in self.addresses)
        return next((question for question in found if question in flows), None)

    def of_client(self, client: bytes) -> int:
        """How many this address has."""
        return self._per_client.get(client, 0)

    def hear(self, copies: Iterator[Copy], now: float, beginning: Beginning) -> Copy | None:
        """Takes note of packets that were relayed, until one is of none of these flows and doesn't
        begin one: there is a row of it, or no room.  That one is returned, None if there is none.

        Nothing else in krelay is done so often but for the way of a packet through the queue, so
        all is written out here.
        """
        until, room, per_client, displaces = beginning
        flows, rows, clients, ids = self._flows, self._rows, self._per_client, self._ids
        server = self._server
        get, of_client, of_others = flows.get, clients.get, self._of_others.get
        begun: list[bytes] = []
        left: Copy | None = None
        for copy in copies:
            hook, head = copy
            if hook == _PREROUTING:
                question = head[12:24]
                flow = get(question)
                if flow is not None:
                    flow.asked += 1
                    flow.asked_bytes += head[2] << 8 | head[3]
                    flow.heard_at = now
                    if flow.asked == self._busy:
                        self._on_busy(question)
                    continue
                if question in rows:
                    left = copy
                    break
                client = question[:4]
                count = of_client(client, 0)
                surplus = count + of_others(client, 0) - per_client
                if surplus >= 0 or len(begun) >= room:
                    its = client if surplus >= 0 else None
                    if surplus > 0 or not displaces or not self.remove_oldest(its):
                        left = copy
                        break
                    room += 1
                    count = of_client(client, 0)
                clients[client] = count + 1
                flows[question] = LearntFlow(next(ids), server, now, 1, head[2] << 8 | head[3])
                begun.append(question)
            else:
                src, dst, sport, dport = _ENDS.unpack(head)
                flow = get(dst + src + dport + sport)
                if flow is None:
                    left = copy
                    break
                flow.answered += 1
                flow.answered_bytes += head[2] << 8 | head[3]
                flow.heard_at = now
        if begun:
            self._due.put(self._due.second(until), begun)
        return left

    def begin(self, question: bytes, now: float, beginning: Beginning) -> None:
        """One more, of which nothing has been told yet."""
        self._flows[question] = LearntFlow(next(self._ids), self._server, now, 0, 0)
        self._per_client[question[:4]] += 1
        self._due.put(self._due.second(beginning.until), [question])

    def remove(self, question: bytes) -> LearntFlow | None:
        """Takes one out, if it is there."""
        flow = self._flows.pop(question, None)
        if flow is not None:
            client = question[:4]
            self._per_client[client] -= 1
            if not self._per_client[client]:
                del self._per_client[client]
        return flow

    def remove_oldest(self, client: bytes | None = None) -> bool:
        """Takes out the one that began first, of this client if it is among the first of all.

        Whether there was one.  A client with a good part of all is soon found; who isn't has few.
        """
        flows, oldest = self._flows, self._oldest
        for fetched in (False, True):
            if fetched:
                # To find the first in a dictionary takes the longer, the more have gone before it.
                oldest.clear()
                oldest.extend(islice(flows.items(), _FETCHED))
            while oldest and flows.get(oldest[0][0]) is not oldest[0][1]:
                oldest.popleft()
            seen = 0
            for at, (question, flow) in enumerate(oldest):
                if flows.get(question) is not flow:
                    continue
                if client is None or question[:4] == client:
                    del oldest[at]
                    self.remove(question)
                    self.displaced += 1
                    return True
                seen += 1
                if seen == _SEARCHED:
                    return False
        return False

    def expire(self, now: float, timeout: float) -> None:
        """Takes out those that have been silent for so many seconds.  Looks only at those due."""
        for _, begun in self._due.due(now):
            again: dict[int, list[bytes]] = {}
            for question in chain.from_iterable(begun):
                flow = self._flows.get(question)
                if flow is None:
                    continue
                when = flow.heard_at + timeout
                if when <= now:
                    self.remove(question)
                else:
                    again.setdefault(self._due.second(when), []).append(question)
            for second, questions in again.items():
                self._due.put(second, questions)

    def clear(self) -> None:
        """Takes out all."""
        self._flows.clear()
        self._oldest.clear()
        self._per_client.clear()
        self._due.clear()


_PREROUTING = int(Hook.PREROUTING)
_ENDS = struct.Struct("12x4s4s2s2s4x")
"""Addresses and ports of a packet, by its head."""
