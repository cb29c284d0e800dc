"""What carries offloaded flows: a protocol.  Pure.

The policy (policy.py) decides which rewrites are offloaded, the accounting (accounting.py) knows
what was counted for them, the service (service.py) says when.  A backend holds them: maps of
nftables (nft.py), or the kernel of the tests (tests/tools/kernel.py).  It decides nothing.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from knet.endpoint import Proto
from knet.netlink.nflog import Copy
from knet.netlink.nftables import Count
from krelay.nat.flow import Rewrite
from krelay.rules.offloaded import BEGINNING
from krelay.rules.steprows import STEP_ROWS
from krelay.steps import Step

Counted = tuple[Rewrite, Count]

_FIELDS = {
    "saddr": slice(0, 4),
    "daddr": slice(4, 8),
    "sport": slice(8, 10),
    "dport": slice(10, 12),
}
_CHANGED = {step: _FIELDS[row.field] for step, row in STEP_ROWS.items()}


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
    def port(self) -> int | None:
        """Of the netlink socket by which it changes nf_tables: those changes are its own."""

    @property
    def capacity(self) -> int:
        """Rewrites of each step that it has room for."""

    def change(self, changes: Changes) -> Iterable[Counted]:
        """Withdraws, then installs.  What was counted in the end for those that were withdrawn, in
        any order, but only of steps that flows show (SIDES)."""

    def read(self, rewrites: Sequence[Rewrite]) -> Iterable[Counted]:
        """What has been counted for each of these so far."""

    def totals(self) -> dict[tuple[Proto, Step], int]:
        """Packets by step that it has rewritten."""

    def leave(self, rewrites: Sequence[Rewrite]) -> Iterable[Counted]:
        """Withdraws these before it goes; what was counted for those that are still there.

        Raises nothing.
        """

    def renew(self) -> None:
        """Forgets answers that may still come, after OffloadLost."""

    def learnt(self, names: Sequence[str], client: bytes, port: bytes) -> str | None:
        """The set of these (dnslearning.LEARNT) that has a query from there."""

    def close(self) -> None:
        """Lets go of it; what it holds stays as it is."""


class OffloadEvents(Protocol):
    """What a backend tells of packets that it has rewritten: heads of them, each told once."""

    def begun(self) -> list[Copy]:
        """SYNs with which tcp-relay began its connections to the server."""

    def ended(self) -> list[Copy]:
        """FINs with which tcp-relay passed on that an end had ended its direction."""


def new_value(rewrite: Rewrite) -> bytes:
    """The one thing that the step of this rewrite changes: an address or a port."""
    return rewrite.new[_CHANGED[rewrite.step]]


def is_simple(rewrite: Rewrite) -> bool:
    """Whether this rewrite changes nothing but the one field that its step changes."""
    field = _CHANGED.get(rewrite.step)
    if field is None:
        return False
    old, new = rewrite.old, rewrite.new
    return old[: field.start] == new[: field.start] and old[field.stop :] == new[field.stop :]


def begins(rewrite: Rewrite) -> bool:
    """Whether this is of the packets of tcp-relay's with which it is about to begin a connection to
    the server: one SYN of these may go past the worker."""
    flow = rewrite.flow
    return rewrite.step is BEGINNING and flow.leg is None and not flow.tracker.server_answered
