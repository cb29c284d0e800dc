"""What carries offloaded flows: a protocol.  Pure.

The policy (policy.py) decides which rewrites are offloaded, the accounting (accounting.py) knows
what was counted for them, the service (service.py) says when.  A backend holds them: maps of
BPF programs (tc.py), or the kernel of the tests (tests/tools/kernel.py).  It decides nothing.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from knet.endpoint import Proto
from krelay.nat.dnsflows import Exchange
from krelay.nat.flow import Rewrite
from krelay.offload.layout import Counted, OwnPacket
from krelay.offload.learning import Learning
from krelay.steps import Step

FOREVER = float(1 << 32)
CountedRewrite = tuple[Rewrite, Counted]


class OffloadLost(Exception):
    """The backend doesn't hold what it was given.  The text is its reason."""


class Changes(NamedTuple):
    """What the backend is to do: first what it withdraws, then what it installs."""

    withdrawn: list[Rewrite]
    installed: list[Rewrite]


class OffloadBackend(Protocol):
    """Holds rewrites, carries them out, and counts.  Each method but `close` may raise OffloadLost.

    From OffloadLost on it is of no use: the service makes another one, and empty.
    """

    @property
    def capacity(self) -> int:
        """Rewrites of each step that it has room for."""

    def change(self, changes: Changes) -> Iterable[CountedRewrite]:
        """Withdraws, then installs.  What was counted in the end for those that were withdrawn, in
        any order, but only of steps that flows show (SIDES)."""

    def read(self, rewrites: Sequence[Rewrite]) -> Iterable[CountedRewrite]:
        """What has been counted for each of these so far."""

    def totals(self) -> dict[tuple[Proto, Step], int]:
        """Packets by step that it has rewritten."""

    def own_packets(self) -> list[OwnPacket]:
        """Packets of tcp-relay's that it has seen and that change a connection, each told once;
        some of those not told yet, [] if there are none."""

    def learn(self, learning: Learning | None) -> None:
        """Which queries begin a flow by themselves, from now on; None: none does."""

    def mind(self, addr: bytes, port: int, until: float = FOREVER) -> None:
        """Nothing from there begins one, until then (seconds of CLOCK_MONOTONIC)."""

    def mind_no_more(self, addr: bytes, port: int) -> None:
        """It may again."""

    def unlearn(self, query: bytes) -> None:
        """What answers this query, by its flow key, goes to the worker."""

    def exchanges(self) -> list[Exchange]:
        """Queries and answers that it has relayed by itself, each told once; some of those not told
        yet, [] if there are none."""

    def leave(self, rewrites: Sequence[Rewrite]) -> Iterable[CountedRewrite]:
        """Withdraws these before it goes; what was counted for those that are still there.

        Raises nothing.
        """

    def close(self) -> None:
        """Lets go of it; what it holds stays as it is."""
