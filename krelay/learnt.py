"""Flows that the kernel has learnt by itself: a question each, and mostly its answer.

A resolver asks each question from a port of its own, so half of its packets begin a flow.  A visit
to the worker for each, and a row, would cost more than all else that a relay does for it.  So for
these services (ruleset.py) the kernel decides by itself what can only be decided one way, relays
question and answer, and sends copies of both packets' heads.  From them this table is filled, some
milliseconds later (nat.py).  It holds as little as may be, and makes a whole row of it only when
somebody wants to see it, or when a packet comes that the worker must decide about.
"""

from collections import Counter
from collections.abc import Iterator

from krelay.wheel import Wheel

_SEARCHED = 64
"""Flows, the oldest, among which one of a client's is looked for."""


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

    def __init__(self, row_id: int, server: bytes, now: float) -> None:
        self.id = row_id
        self.server = server
        """The address that the question went on to."""
        self.began_at = self.heard_at = now
        self.asked = self.asked_bytes = self.answered = self.answered_bytes = 0


class LearntFlows:
    """They that haven't been silent for so many seconds, the oldest first."""

    def __init__(self) -> None:
        self._flows: dict[bytes, LearntFlow] = {}
        self._per_client: Counter[bytes] = Counter()
        self._due = Wheel[bytes]()

    def __len__(self) -> int:
        return len(self._flows)

    def __iter__(self) -> Iterator[tuple[bytes, LearntFlow]]:
        return iter(list(self._flows.items()))

    def get(self, question: bytes) -> LearntFlow | None:
        """The flow that begins with such a packet."""
        return self._flows.get(question)

    def of_client(self, client: bytes) -> int:
        """How many this address has."""
        return self._per_client.get(client, 0)

    def begin(self, question: bytes, flow: LearntFlow, due: float) -> None:
        """One more."""
        self._flows[question] = flow
        self._per_client[question[:4]] += 1
        self._due.put(self._due.second(due), question)

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
        for seen, question in enumerate(self._flows):
            if client is None or question[:4] == client:
                self.remove(question)
                return True
            if seen == _SEARCHED:
                return False
        return False

    def expire(self, now: float, timeout: float) -> None:
        """Takes out those that have been silent for so many seconds.  Looks only at those due."""
        for _, questions in self._due.due(now):
            for question in questions:
                flow = self._flows.get(question)
                if flow is None:
                    continue
                when = flow.heard_at + timeout
                if when <= now:
                    self.remove(question)
                else:
                    self._due.put(self._due.second(when), question)

    def clear(self) -> None:
        """Takes out all."""
        self._flows.clear()
        self._per_client.clear()
        self._due.clear()
