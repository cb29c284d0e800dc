"""The backend of tc: programs where packets come in and go out, and the maps that they look into.

`TcBackend` holds the maps, and changes them by bpf(2): some microseconds a rewrite.  What the
programs are attached to is host/attachment.py's matter.  Maps and programs live on while a filter
has them, also when krelay has been killed.
"""

import errno
import os
import struct
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources

from knet.bpf import kernel, objectfile
from knet.bpf.kernel import BpfError, BpfMap, BpfProgram
from knet.bpf.objectfile import ObjectFile
from knet.bpf.ring import BpfRing
from knet.endpoint import FlowKey, Proto
from krelay.nat.dnsflows import Exchange
from krelay.nat.flow import Rewrite
from krelay.offload import layout
from krelay.offload.backend import (
    FOREVER,
    Changes,
    CountedRewrite,
    OffloadBackend,
    OffloadLost,
)
from krelay.offload.layout import OwnPacket
from krelay.offload.learning import Learning
from krelay.steps import SIDES, Step

PASSES = "passes"
"""The program that a rule asks; all others are tc's."""
EXCHANGES_TOGETHER = 2048
"""Queries and answers read at a time: some milliseconds."""
EVENTS_TOGETHER = 1024
"""Events read at a time."""
UNUSED_FOR = 1.0
"""Seconds from the last rewrite of a port's until it is said that there is none."""
PER_FLOW = {"rewrites": layout.MOST_PER_FLOW, "queries": 1}
"""Maps with so many elements for each flow that there may be."""
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")


@cache
def byte_code() -> ObjectFile:
    """The programs as they were compiled (`make bpf`)."""
    return objectfile.parse(resources.files("krelay.offload").joinpath("relay.o").read_bytes())


def reason_of(error: OSError) -> str:
    """In a few words; of a program that is refused, without what its verifier said."""
    return (error.strerror or str(error)).partition("\n")[0]


def why_not() -> str | None:
    """Why the kernel runs no such programs here; None if it does."""
    try:
        TcBackend(1).close()
    except OSError as error:
        return f"the kernel runs no programs of krelay's: {reason_of(error)}"
    return None


class TcBackend(OffloadBackend):
    """Maps of rewrites, and the programs that carry them out.

    Raises BpfError where the kernel has no such programs, or forbids them.
    """

    def __init__(self, capacity: int, learnt: int = 0) -> None:
        """`capacity`: rewrites of each step.  `learnt`: the priority of queries that begin flows by
        themselves."""
        self._learnt = learnt
        self._capacity = capacity
        self._rewrites_by_port = Counter[tuple[Proto, int]]()
        self._unused_since: dict[tuple[Proto, int], float] = {}
        """Ports whose last rewrite has gone; their bits are still set."""
        self._bits: dict[int, int] = {}
        """Elements of `ports`."""
        self._links: dict[int, int] = {}
        self._learning: Learning | None = None
        self._minds = False
        """Whether anything has ever been minded."""
        kernel.allow_memory()
        code = byte_code()
        self.maps: dict[str, BpfMap] = {}
        self.programs: dict[str, BpfProgram] = {}
        try:
            for name, spec in code.maps.items():
                if (each := PER_FLOW.get(name)) is not None:
                    spec = spec._replace(capacity=capacity * each)
                self.maps[name] = BpfMap.make(f"krelay_{name}", spec)
            descriptors = {name: each.descriptor for name, each in self.maps.items()}
            for name, program in code.programs.items():
                kind = kernel.SOCKET_FILTER if name == PASSES else kernel.SCHED_CLS
                linked = program.linked(descriptors)
                self.programs[name] = BpfProgram.load(f"krelay_{name}", linked, kind=kind)
            self._ring = BpfRing(self.maps["events"], layout.EVENT_SIZE)
            self._exchanges = BpfRing(self.maps["exchanges"], layout.EXCHANGE_SIZE)
        except BaseException:
            self._close_all()
            raise
        self._rewrites, self._totals = self.maps["rewrites"], self.maps["totals"]

    @property
    def capacity(self) -> int:
        """Rewrites of each step that it has room for."""
        return self._capacity

    def attached(self, links: Mapping[int, int]) -> None:
        """The programs are attached to these links, by number, each with the bytes of its longest
        packet.  Raises OffloadLost."""
        held = self.maps["links"]
        try:
            for number in self._links.keys() - links.keys():
                held.delete(_U32.pack(number))
            for number, mtu in links.items():
                if self._links.get(number) != mtu:
                    held.update(_U32.pack(number), _U32.pack(mtu))
        except BpfError as error:
            raise OffloadLost(str(error)) from None
        self._links = dict(links)

    def change(self, changes: Changes) -> list[CountedRewrite]:
        """Withdraws, then installs; what was counted in the end for those of SIDES.

        Raises OffloadLost.
        """
        final: list[CountedRewrite] = []
        rewrites = self._rewrites
        try:
            for each in changes.withdrawn:
                key = layout.key_of(each.flow.proto, each.old)
                if each.step in SIDES:
                    final.append((each, self._counted(each, key)))
                rewrites.delete(key)
                self._released(layout.port_of(each))
            for each in changes.installed:
                key = layout.key_of(each.flow.proto, each.old)
                self._used(layout.port_of(each))
                rewrites.update(key, layout.value_of(each))
            if self._unused_since:
                self._mark_unused()
        except BpfError as error:
            raise OffloadLost(str(error)) from None
        return final

    def _used(self, port: tuple[Proto, int]) -> None:
        if not self._rewrites_by_port[port] and self._unused_since.pop(port, None) is None:
            self._set_bit(port, is_used=True)
        self._rewrites_by_port[port] += 1

    def _released(self, port: tuple[Proto, int]) -> None:
        self._rewrites_by_port[port] -= 1
        if not self._rewrites_by_port[port]:
            del self._rewrites_by_port[port]
            self._unused_since[port] = time.monotonic()

    def _mark_unused(self) -> None:
        """Not at once: the next rewrite is mostly near."""
        since = time.monotonic() - UNUSED_FOR
        for port in [port for port, when in self._unused_since.items() if when < since]:
            del self._unused_since[port]
            self._set_bit(port, is_used=False)

    def _set_bit(self, port: tuple[Proto, int], *, is_used: bool) -> None:
        at, number = layout.element_of(*port)
        bits = self._bits.get(at, 0) & ~(1 << number) | is_used << number
        self._bits[at] = bits
        self.maps["ports"].update(_U32.pack(at), _U64.pack(bits))

    def read(self, rewrites: Sequence[Rewrite]) -> Iterator[CountedRewrite]:
        """What has been counted for each so far.  Raises OffloadLost if one isn't there."""
        try:
            for each in rewrites:
                yield each, self._counted(each, layout.key_of(each.flow.proto, each.old))
        except BpfError as error:
            raise OffloadLost(str(error)) from None

    def _counted(self, rewrite: Rewrite, key: bytes) -> layout.Counted:
        value = self._rewrites.look_up(key)
        if value is None:
            raise OffloadLost(os.strerror(errno.ENOENT))
        return layout.counted(value)

    def leave(self, rewrites: Sequence[Rewrite]) -> Iterator[CountedRewrite]:
        """Takes these out; what was counted for those that are still there.  Raises nothing."""
        for each in rewrites:
            key = layout.key_of(each.flow.proto, each.old)
            with suppress(BpfError):
                value = self._rewrites.look_up(key)
                self._rewrites.delete(key)
                if value is not None and each.step in SIDES:
                    yield each, layout.counted(value)

    def totals(self) -> dict[tuple[Proto, Step], int]:
        """Packets by step that the kernel has rewritten itself.  Raises OffloadLost."""
        return layout.totals_by_step(self._sums())

    @property
    def lost(self) -> int:
        """Events that found no room."""
        return self._sums()[layout.LOST]

    def _sums(self) -> list[int]:
        """Of each element of `totals`, over all processors.  Raises OffloadLost."""
        try:
            values = [
                self._totals.look_up(_U32.pack(at)) or bytes(8)
                for at in range(self._totals.spec.capacity)
            ]
        except BpfError as error:
            raise OffloadLost(str(error)) from None
        return [sum(struct.unpack(f"={len(each) // 8}Q", each)) for each in values]

    def own_packets(self) -> list[OwnPacket]:
        """Packets of tcp-relay's that change a connection, some of those not read yet; [] if there
        are none."""
        return layout.own_packets(self._ring.read(EVENTS_TOGETHER))

    # Queries that begin a flow by themselves

    def learn(self, learning: Learning | None) -> None:
        """Which queries do; None: none does.  Raises OffloadLost."""
        before, only = self._learning, self.maps["learning"]
        try:
            only.delete(layout.ONLY)
            _differ(
                self.maps["hosts"],
                {layout.address(each.packed) for each in before.addresses} if before else set(),
                {layout.address(each.packed) for each in learning.addresses} if learning else set(),
            )
            _differ(
                self.maps["strangers"],
                set(map(layout.prefix, before.strangers)) if before else set(),
                set(map(layout.prefix, learning.strangers)) if learning else set(),
            )
            self._learning = learning
            self._set_server()
        except BpfError as error:
            raise OffloadLost(str(error)) from None

    def _set_server(self) -> None:
        if self._learning is not None:
            server = self._learning.server.packed
            self.maps["learning"].update(
                layout.ONLY, layout.learning(server, self._learnt, minds=self._minds)
            )

    def mind(self, addr: bytes, port: int, until: float = FOREVER) -> None:
        """Nothing from there begins one, until then.  Raises OffloadLost."""
        try:
            self.maps["minded"].update(layout.end(addr, port), _U64.pack(int(until * 1e9)))
            if not self._minds:
                self._minds = True
                self._set_server()
        except BpfError as error:
            raise OffloadLost(str(error)) from None

    def mind_no_more(self, addr: bytes, port: int) -> None:
        """It may again.  Raises OffloadLost."""
        try:
            self.maps["minded"].delete(layout.end(addr, port))
        except BpfError as error:
            raise OffloadLost(str(error)) from None

    def unlearn(self, query: bytes) -> None:
        """What answers this query goes to the worker.  Raises OffloadLost."""
        client = FlowKey.unpack(query).src
        try:
            self.maps["queries"].delete(layout.end(*client))
        except BpfError as error:
            raise OffloadLost(str(error)) from None

    def exchanges(self) -> list[Exchange]:
        """Queries and answers that were relayed, some of those not read yet; [] if there are
        none."""
        return list(layout.exchanges(self._exchanges.read(EXCHANGES_TOGETHER)))

    def fileno(self) -> int:
        """Readable when many of those wait."""
        return self.maps["exchanges"].descriptor

    def close(self) -> None:
        """Lets go of all; filters that are attached keep what they need."""
        self._ring.close()
        self._exchanges.close()
        self._close_all()

    def _close_all(self) -> None:
        for program in self.programs.values():
            program.close()
        for each in self.maps.values():
            each.close()


def _differ(held: BpfMap, before: set[bytes], now: set[bytes]) -> None:
    """What the map has, of keys alone.  Raises BpfError."""
    for key in before - now:
        held.delete(key)
    for key in now - before:
        held.update(key, layout.IS_THERE)
