"""Which client the control sockets serve next: answers are made piece by piece, in turn."""

import time
from collections import deque
from typing import Protocol

from knet.loop import Loop, Timer
from knet.unixsock import Peer

BUSY = 0.0001
"""Seconds between two pieces of answers, made in two turns that follow each other, that tell of
other work: two system calls take a tenth of it."""
SHARE = 3
"""Times as long as a piece of an answer took, others have their turn before the next."""
LONGEST, LONGEST_OF_ROOT = 0.1, 0.02
"""Seconds at most that a piece of an answer waits so, and one of root's."""


class TakesTurns(Protocol):
    """A client."""

    peer: Peer
    waits: bool
    """Whether its turn is to come."""

    def step(self) -> None:
        """Its turn."""


class Turns:
    """Which client next has a request heard, or a piece of an answer made: one in a turn of the
    loop.

    Root's clients first, and those of others one after the other.  A turn that took longer than
    nothing had other work: then the next piece waits until that has had its share.
    """

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._roots: deque[TakesTurns] = deque()
        self._others: deque[TakesTurns] = deque()
        self._is_going = False
        self._waiting: Timer | None = None
        self._took = 0.0
        self._ended_at = 0.0

    def want(self, client: TakesTurns) -> None:
        """It has something to do; it is told to `step` once."""
        if client.waits:
            return
        client.waits = True
        (self._roots if client.peer.is_root else self._others).append(client)
        if not self._is_going:
            self._is_going = True
            self._step()  # a trace is to show what comes right behind its request
        elif client.peer.is_root and self._waiting is not None and self._waiting.pending:
            self._waiting.cancel()  # that was for others
            self._loop.call_soon(self._step)

    def _next(self) -> None:
        if not (self._roots or self._others):
            self._is_going = False
        elif time.monotonic() - self._ended_at > BUSY:
            wait = min(SHARE * self._took, LONGEST_OF_ROOT if self._roots else LONGEST)
            self._waiting = self._loop.call_at(self._loop.now + wait, self._step)
        else:
            self._step()

    def _step(self) -> None:
        began = time.monotonic()
        client = (self._roots or self._others).popleft()
        client.waits = False
        try:
            client.step()
        finally:
            self._ended_at = time.monotonic()
            self._took = self._ended_at - began
            self._loop.call_soon(self._next)
