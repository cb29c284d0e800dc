"""The backend of nftables: its maps, written and read, thousands a second, on one socket.

Each call waits for the kernel's answer, which takes some microseconds an element and some tens for
a transaction; so what a turn of the loop has gathered goes together.  A transaction happens as a
whole or not at all.  If one fails, or the answer is not what it must be, another program has
changed the maps: OffloadLost is raised, and the service makes them anew.
"""

import errno
import itertools
import os
import socket
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from knet import netlink
from knet.endpoint import Proto
from knet.netlink import nftables
from knet.netlink.nftables import Elements
from knet.netlink.socket import NetlinkSocket
from knet.sockbuf import Direction, enlarge
from krelay.nat.flow import Rewrite
from krelay.offload.backend import Changes, Counted, OffloadBackend, OffloadLost, begins, new_value
from krelay.rules.offloaded import BEGINS, map_name
from krelay.rules.steprows import DSCP_STEPS, STEP_ROWS
from krelay.steps import SIDES, Step

TOGETHER = 256
"""Elements in one transaction, or asked for at once: a millisecond.  Fewer where the kernel grants
less than _BUFFER."""
TIMEOUT = 5.0
"""Seconds: another program's transaction may be under way."""
_BUFFER = 4 << 20
_RECEIVE = 1 << 17
_LOST = (errno.ENOBUFS, errno.EBADF, errno.EAGAIN)
"""Errors after which there is nothing more to read; EAGAIN: not within TIMEOUT."""
_WAITS = struct.pack("@ll", int(TIMEOUT), 0)
"""struct timeval, for SO_RCVTIMEO: the kernel itself keeps the time, while a time-out of Python's
would ask for readiness (poll) before each answer."""


_DSCPS = [bytes((tos >> 2,)) for tos in range(256)]
"""By the byte of which it is a part (RFC 2474, section 3)."""


class NftBackend(OffloadBackend):
    """The maps of one table.  Raises OSError without privilege."""

    def __init__(self, table: str, capacity: int = 0, *, follows_dscp: bool = False) -> None:
        """`capacity`: elements of each map; `follows_dscp`: the keys of some maps have the DSCP, as
        RuleSpec has it."""
        self._table = table
        self._capacity = capacity
        self._marked = DSCP_STEPS if follows_dscp else ()
        self._elements = {
            (proto, step): Elements(table, map_name(proto, step))
            for proto in Proto
            for step in STEP_ROWS
        }
        self._begins = Elements(table, BEGINS)
        self._socket, self._together = _connected()

    @property
    def capacity(self) -> int:
        """Elements of each map (RuleSpec.room)."""
        return self._capacity

    @property
    def port(self) -> int:
        """Of this socket: the changes it makes are announced with it."""
        return self._socket.port

    def change(self, changes: Changes) -> list[Counted]:
        """Carries them out; what was counted for those that were withdrawn, in any order.

        Raises OffloadLost.
        """
        final: list[Counted] = []
        back, fresh = list(changes.withdrawn), list(changes.installed)
        while back or fresh:
            some, back = back[: self._together], back[self._together :]
            room = self._together - len(some)
            others, fresh = fresh[:room], fresh[room:]
            final += self._exchange(some, others)
        return final

    def _exchange(self, back: list[Rewrite], fresh: list[Rewrite]) -> Iterable[Counted]:
        """Takes these out, then puts those in, in one transaction."""
        told = self._by_map(each for each in back if each.step in SIDES)
        silent = self._by_map(each for each in back if each.step not in SIDES)
        begun = [each.old for each in fresh if begins(each)]
        numbers = itertools.count(1)
        # The kernel tells of those at once that follow each other (nft_commit_notify,
        # net/netfilter/nf_tables_api.c), up to four kilobytes.
        requests = [
            elements.delete(self._keys(those), next(numbers), tell=tell)
            for tell, some in ((True, told), (False, silent))
            for elements, those in some.items()
        ]
        if begun:
            requests.append(self._begins.put(begun, next(numbers)))
        for elements, those in self._by_map(fresh).items():
            pairs = zip(self._keys(those), map(new_value, those), strict=True)
            requests.append(elements.add(pairs, next(numbers)))
        # The kernel tells of elements that went in their order, and with the sequence number 0.
        gone = [
            nftables.element_count(message)
            for message in self._transaction(requests)
            if message.kind == nftables.DELETE_ELEMENT
        ]
        counts = [count for count in gone if count is not None]
        rewrites = [each for those in told.values() for each in those]
        if not len(rewrites) == len(gone) == len(counts):
            raise OffloadLost(os.strerror(errno.EPROTO))
        return zip(rewrites, counts, strict=True)

    def leave(self, rewrites: Sequence[Rewrite]) -> Iterator[Counted]:
        """Takes these out before the maps go; what was counted for those that are still there.

        Raises nothing, whatever another program has done to the maps.
        """
        for some in self._slices(rewrites):
            with suppress(OffloadLost):
                self.renew()
                try:
                    yield from self.change(Changes(list(some), []))
                except OffloadLost:
                    self.renew()
                    yield from self._found(some)

    def _found(self, some: Sequence[Rewrite]) -> Iterator[Counted]:
        requests = (self._map(each).get(self._keys([each]), at) for at, each in enumerate(some, 1))
        self._send(b"".join(requests))
        for rewrite, message in zip(some, self._answers(len(some)), strict=False):
            count = nftables.element_count(message)
            if count is not None and rewrite.step in SIDES:
                yield rewrite, count

    def read(self, rewrites: Sequence[Rewrite]) -> Iterator[Counted]:
        """What the kernel has counted for each.  Raises OffloadLost if it lacks one of them."""
        for elements, those in self._by_map(rewrites).items():
            for some in self._slices(those):
                self._send(elements.get(self._keys(some), 1))
                for rewrite, message in zip(some, self._answers(len(some)), strict=True):
                    count = nftables.element_count(message)
                    if count is None or message.sequence != 1:
                        raise OffloadLost(os.strerror(message.error or errno.EPROTO))
                    yield rewrite, count

    def totals(self) -> dict[tuple[Proto, Step], int]:
        """Packets by step that the kernel has rewritten itself.  Raises OffloadLost."""
        names = {map_name(*at): at for at in self._elements}
        self._send(nftables.get_counters(self._table))
        found = {}
        for message in self._answers(None):
            if message.error:
                raise OffloadLost(os.strerror(message.error))
            named = nftables.named_counter(message)
            if named is not None and named[0] in names:
                found[names[named[0]]] = named[1].packets
        return found

    def learnt(self, names: Sequence[str], client: bytes, port: bytes) -> str | None:
        """The set of these that has a query from there.  Raises OffloadLost."""
        requests = (
            nftables.get_learnt(self._table, name, client, port, at)
            for at, name in enumerate(names, 1)
        )
        self._send(b"".join(requests))
        found = None
        for message in self._answers(len(names)):
            if message.error not in (None, errno.ENOENT):
                raise OffloadLost(os.strerror(message.error))
            if message.error is None and 1 <= message.sequence <= len(names):
                found = names[message.sequence - 1]
        return found

    def renew(self) -> None:
        """Asks by another socket from now on: after OffloadLost, answers may still be on their way.

        Raises OffloadLost.
        """
        self._socket.close()
        try:
            self._socket, self._together = _connected()
        except OSError as error:
            raise OffloadLost(str(error)) from None

    def close(self) -> None:
        """Leaves the maps as they are."""
        self._socket.close()

    def _by_map(self, rewrites: Iterable[Rewrite]) -> dict[Elements, list[Rewrite]]:
        found: dict[Elements, list[Rewrite]] = {}
        for each in rewrites:
            found.setdefault(self._map(each), []).append(each)
        return found

    def _slices(self, rewrites: Sequence[Rewrite]) -> Iterable[Sequence[Rewrite]]:
        step = self._together
        return (rewrites[at : at + step] for at in range(0, len(rewrites), step))

    def _keys(self, rewrites: Sequence[Rewrite]) -> list[bytes]:
        """Of rewrites of one step: what their packets read, in some steps with the DSCP."""
        if rewrites[0].flow.proto is Proto.TCP and rewrites[0].step in self._marked:
            return [each.old + _DSCPS[each.tos] for each in rewrites]
        return [each.old for each in rewrites]

    def _map(self, rewrite: Rewrite) -> Elements:
        return self._elements[rewrite.flow.proto, rewrite.step]

    def _transaction(self, requests: list[bytes]) -> list[netlink.Message]:
        """Carries these out; what the kernel tells of it."""
        requests[-1] = netlink.acknowledged(requests[-1])
        self._send(nftables.joined(requests))
        told = []
        for message in self._answers(None, until=len(requests)):
            if message.subsystem == 0 and message.error:
                raise OffloadLost(os.strerror(message.error))
            told.append(message)
        return told

    def _send(self, data: bytes) -> None:
        """To the kernel; once more if that fails, for a moment without memory changes no map."""
        with suppress(OSError):
            self._socket.send(data)
            return
        try:
            self._socket.send(data)
        except OSError as error:
            raise OffloadLost(str(error)) from None

    def _answers(self, count: int | None, *, until: int | None = None) -> Iterator[netlink.Message]:
        """So many messages; or until the acknowledgement of that one, or the end of a dump."""
        heard, failed = 0, False
        give_up = time.monotonic() + TIMEOUT
        while time.monotonic() < give_up:
            try:
                data = self._socket.recv(_RECEIVE)
            except OSError as error:
                if error.errno in _LOST or failed:
                    raise OffloadLost(str(error)) from None
                failed = True  # what was to be read is still there
                continue
            for message in netlink.messages(data):
                if message.subsystem == 0 and message.kind == netlink.DONE:
                    return
                yield message
                heard += 1
                if heard == count or (message.sequence == until and message.error is not None):
                    return
        raise OffloadLost("the kernel doesn't answer")


def _connected() -> tuple[NetlinkSocket, int]:
    """A socket, and how many elements its buffers take at a time."""
    kernel = NetlinkSocket(netlink.FAMILY)
    try:
        kernel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _WAITS)
        granted = min(enlarge(kernel, direction, _BUFFER) for direction in Direction)
    except OSError:
        kernel.close()
        raise
    return kernel, max(1, TOGETHER * granted // _BUFFER)
