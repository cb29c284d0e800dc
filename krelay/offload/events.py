"""What the packet filter tells of what servers send past the relaying: copies of packets' heads."""

import select
from collections.abc import Callable

from knet.endpoint import Endpoint, FlowKey, Proto
from knet.log import Failures, Log, Throttle
from knet.loop import Loop
from knet.netlink.nflog import Copy
from knet.wire import ipv4
from krelay.offload.copies import Copies
from krelay.rules.spec import unmatched

COPIES_TOGETHER = 256
"""Copies read in one piece."""

SawUnmatched = Callable[[bytes, int, float], Endpoint | None]

_log = Log("kernel")


class KernelEvents:
    """The copies of one krelay's log group.

    `saw_unmatched` is told of a copy of what a server sends past the relaying
    (Worker.saw_elsewhere).
    """

    def __init__(self, loop: Loop, queue: int, saw_unmatched: SawUnmatched) -> None:
        self._loop = loop
        self._group = unmatched(queue)
        self._saw_unmatched = saw_unmatched
        self._unmatched: Copies | None = None
        self._unmatched_warning = Throttle()
        self._failures = Failures(_log)

    @property
    def tells_unmatched(self) -> bool:
        """Whether copies are taken."""
        return self._unmatched is not None

    @property
    def lost(self) -> int:
        """How often the kernel had more copies for us than there was room for."""
        return self._unmatched.lost if self._unmatched is not None else 0

    def listen(self) -> None:
        """Takes copies, if the kernel can make them, until `close`."""
        try:
            self._unmatched = Copies(self._group, together=1)
        except OSError as error:
            _log.info("the kernel can't copy packets' heads", group=self._group, reason=error)
            return
        self._loop.add(self._unmatched.fileno(), select.EPOLLIN, self._read_unmatched)

    def close(self) -> None:
        """Gives the group up."""
        if self._unmatched is not None:
            self._loop.remove(self._unmatched.fileno())
            self._unmatched.close()
            self._unmatched = None

    def _read_unmatched(self, _: int = 0) -> None:
        """What servers send from ports that no client has asked: clients wait for it in vain."""
        for hook, head in self._read():
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

    def _read(self) -> list[Copy]:
        """Those that wait, about so many.  What can't be read now is read the next time."""
        if self._unmatched is None:
            return []
        try:
            return self._unmatched.read(COPIES_TOGETHER)
        except OSError as error:
            self._failures.tell(self._loop.now, "copies can't be read; trying again", error)
            return []
