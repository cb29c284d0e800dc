"""What the packet filter tells of packets that it relays by itself: copies of their heads.

Queries and responses that it has learnt, and what servers send past the relaying.  Both kinds have
a log group of their own (rules/spec.py).
"""

import select
from collections.abc import Callable

from knet.endpoint import Endpoint, FlowKey, Proto
from knet.log import Failures, Log, Throttle
from knet.loop import Loop
from knet.netlink.nflog import TOGETHER, Copy
from knet.wire import ipv4
from krelay.nat.table import NatTable
from krelay.offload.copies import Copies
from krelay.rules.spec import unmatched

COPIES_TOGETHER = 2048
"""Copies of packets taken note of before packets have their turn: some milliseconds."""
UNMATCHED_TOGETHER = 256
"""Copies of what servers send past the relaying read in one piece."""

SawUnmatched = Callable[[bytes, int, float], Endpoint | None]

_log = Log("kernel")


class KernelEvents:
    """The copies of one krelay's log groups, for the flows of `nat`.

    `saw_unmatched` is told of a copy of what a server sends past the relaying
    (Worker.saw_elsewhere).
    """

    def __init__(self, loop: Loop, nat: NatTable, group: int, saw_unmatched: SawUnmatched) -> None:
        self._loop = loop
        self._nat = nat
        self._group = group
        self._saw_unmatched = saw_unmatched
        self._copies: Copies | None = None
        self._unmatched: Copies | None = None
        self._unmatched_warning = Throttle()
        self._failures = Failures(_log)

    @property
    def tells_queries(self) -> bool:
        """Whether copies of queries and responses are taken."""
        return self._copies is not None

    @property
    def tells_unmatched(self) -> bool:
        """Whether copies of what servers send past the relaying are taken."""
        return self._unmatched is not None

    @property
    def lost(self) -> int:
        """How often the kernel had more copies for us than there was room for."""
        groups = (self._copies, self._unmatched)
        return sum(each.lost for each in groups if each is not None)

    def listen(self) -> None:
        """Takes copies, of each kind that the kernel can make, until `close`."""
        self._copies = _copies_of(self._group, TOGETHER)
        if self._copies is not None:
            self._loop.add(self._copies.fileno(), select.EPOLLIN, self.read_queries)
        self._unmatched = _copies_of(unmatched(self._group), 1)
        if self._unmatched is not None:
            self._loop.add(self._unmatched.fileno(), select.EPOLLIN, self._read_unmatched)

    def close(self) -> None:
        """Takes note of what waits, of queries, and gives the groups up."""
        if self._copies is not None:
            self.read_queries()
            self._loop.remove(self._copies.fileno())
        if self._unmatched is not None:
            self._loop.remove(self._unmatched.fileno())
        for copies in (self._copies, self._unmatched):
            if copies is not None:
                copies.close()
        self._copies = self._unmatched = None

    def read_queries(self, _: int = 0) -> None:
        """What the kernel tells of queries and answers that it has relayed."""
        if copies := self._read(self._copies, COPIES_TOGETHER):
            self._nat.learning.learn(copies, self._loop.now)

    def _read_unmatched(self, _: int = 0) -> None:
        """What servers send from ports that no client has asked: clients wait for it in vain."""
        for hook, head in self._read(self._unmatched, UNMATCHED_TOGETHER):
            is_udp = head[9] == Proto.UDP
            asked = self._saw_unmatched(head, hook, self._loop.now) if is_udp else None
            if asked is None or (before := self._unmatched_warning.admit(self._loop.now)) is None:
                continue
            _log.warning(
                "a server answers from another port than it was asked at",
                service=f"udp/{asked.port}",
                server=FlowKey.unpack(head[ipv4.FLOW_KEY]).src,
                again=before or None,
                fix=f"write udp/{asked.port}+any-port into services, if that is its way (TFTP)",
            )

    def _read(self, source: Copies | None, most: int) -> list[Copy]:
        """Those that wait, about so many.  What can't be read now is read the next time."""
        if source is None:
            return []
        try:
            return source.read(most)
        except OSError as error:
            self._failures.tell(self._loop.now, "copies can't be read; trying again", error)
            return []


def _copies_of(group: int, together: int) -> Copies | None:
    try:
        return Copies(group, together=together)
    except OSError as error:
        _log.info("the kernel can't copy packets' heads", group=group, reason=error)
        return None
