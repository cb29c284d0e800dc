"""The backend on this host: its programs are loaded, attached to the links, and asked by a rule.

A rule asks only while the programs are attached, and they are attached only while a rule lets pass
what they have marked.  So nothing goes past the worker that nothing rewrites.
"""

import errno
import select
from collections.abc import Callable, Sequence
from contextlib import suppress

from knet.log import Failures, Log
from knet.loop import Loop, Timer
from knet.netlink import nftables
from knet.rules.kernel import has_chain, transaction
from knet.rules.run import PASSING
from krelay.host import attachment
from krelay.host.attachment import Attachment
from krelay.nat.dnsflows import Exchange
from krelay.offload.backend import OffloadLost
from krelay.offload.tc import PASSES, TcBackend, reason_of
from krelay.rules.offloaded import MARK, learnt
from krelay.rules.steprows import OFFLOADED

LINKS_AFTER = 0.01
"""Seconds between the news that links or filters have changed and the look at them."""
READ_AFTER = 0.01
"""Seconds between reads of what is told of queries: together they cost less."""
AGAIN = 1.0
"""Seconds until what couldn't be attached is tried again."""
NEVER = (errno.ENOENT, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES)
"""Errors of a kernel without clsact, filters of BPF or xt_bpf, or without leave."""

_log = Log("kernel")


class Carrier:
    """Carries the packets of offloaded flows, beside the rules of this name.

    `refused` is called with the reason when that isn't possible, for good; `lost` when the kernel
    hasn't what it was given; `heard` with DNS queries and answers that it has relayed by itself.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        refused: Callable[[str], None],
        lost: Callable[[OffloadLost], None],
        heard: Callable[[Sequence[Exchange]], None],
    ) -> None:
        self.backend: TcBackend | None = None
        self.is_asked = False
        """Whether a rule asks the backend."""
        self.is_lost = False
        """Whether the backend isn't what it was; it is about to be made anew."""
        self._loop = loop
        self._name = name
        self._refused = refused
        self._lost = lost
        self._heard = heard
        self._loaded: TcBackend | None = None
        """The one that is to be the backend, when the rules are in."""
        self._attachment: Attachment | None = None
        self._looking: Timer | None = None
        self._reading: Timer | None = None
        self._failures = Failures(_log)

    def load(self, room: int) -> None:
        """Loads the programs, if they aren't: then it is known whether the kernel runs them."""
        if self.backend is None and self._loaded is None:
            try:
                self._loaded = TcBackend(room, learnt(self._name))
            except OSError as error:
                self._refused(f"the kernel runs no programs of krelay's: {reason_of(error)}")

    @property
    def at_work(self) -> TcBackend | None:
        """The backend, unless it isn't what it was."""
        return None if self.is_lost else self.backend

    def make(self, room: int) -> TcBackend | None:
        """A backend with room for so many rewrites of each step, empty and not attached yet."""
        self.is_lost = False
        loaded, self._loaded = self._loaded, None
        if loaded is not None and loaded.capacity != room:
            loaded.close()
            loaded = None
        try:
            if self._attachment is None:
                self._attachment = Attachment(self._name)
                self._loop.add(self._attachment.fileno(), select.EPOLLIN, self._links_changed)
            self.backend = loaded or TcBackend(room, learnt(self._name))
        except OSError as error:
            self._refused(f"the kernel runs no programs of krelay's: {reason_of(error)}")
            return None
        self._loop.add(self.backend.fileno(), select.EPOLLIN, self._told)
        return self.backend

    def attach(self) -> None:
        """Puts the programs where they aren't, and has a rule ask them."""
        backend, links = self.at_work, self._attachment
        if backend is None or links is None:
            return
        try:
            backend.attached(links.attach_all(backend.programs))
        except OffloadLost as error:
            self._lost(error)
        except OSError as error:
            if error.errno in NEVER:
                self._refused(f"programs can't be attached to links: {reason_of(error)}")
                return
            self._failures.tell(self._loop.now, "programs can't be attached; trying again", error)
            self._looking = self._loop.call_at(self._loop.now + AGAIN, self.attach)
        else:
            self.ask()

    def ask(self) -> None:
        """A rule asks the backend from now on, if none does: one, whatever was there."""
        if self.is_asked or self.backend is None:
            return
        program = self.backend.programs[PASSES].descriptor
        try:
            transaction(
                nftables.delete_rules(self._name, OFFLOADED),
                nftables.program_rule(self._name, OFFLOADED, program, MARK),
            )
        except OSError as error:
            # What passes, or rules that another program has taken out: it comes with the next ones.
            if error.errno not in PASSING and has_chain(self._name, OFFLOADED) is not False:
                self._refused(f"rules can't ask programs (xt_bpf): {reason_of(error)}")
            return
        self.is_asked = True

    def ask_no_more(self) -> None:
        """The rules send all packets to the worker, but what is rewritten before."""
        if self.is_asked:
            self.is_asked = False
            with suppress(OSError):  # the rules are gone
                transaction(nftables.delete_rules(self._name, OFFLOADED))

    def drop(self) -> None:
        """There is no backend any more; its filters stay until `detach`, or until others come."""
        if self.backend is not None:
            if self._reading is None:
                self._loop.remove(self.backend.fileno())
            else:
                self._reading.cancel()
                self._reading = None
            self.backend.close()
            self.backend = None

    def detach(self) -> None:
        """Takes the programs from all links, also those that a killed krelay has left."""
        try:
            attachment.detach(self._name)
        except OSError as error:
            self._failures.tell(self._loop.now, "programs can't be detached", error)

    def close(self) -> None:
        """Relaying ends."""
        self.drop()
        if self._loaded is not None:
            self._loaded.close()
            self._loaded = None
        self.detach()
        if self._attachment is not None:
            self._loop.remove(self._attachment.fileno())
            self._attachment.close()
            self._attachment = None

    def _told(self, _: int = 0) -> None:
        """The first of what was told since all was read."""
        if self.backend is not None:
            self._loop.remove(self.backend.fileno())
            self._read_again()

    def _read_again(self) -> None:
        self._reading = self._loop.call_at(self._loop.now + READ_AFTER, self._read)

    def _read(self) -> None:
        """Some of what was told; then packets have their turn."""
        self._reading = None
        if self.backend is None:
            return
        if exchanges := self.backend.exchanges():
            self._read_again()
            self._heard(exchanges)
        else:
            self._loop.add(self.backend.fileno(), select.EPOLLIN, self._told)

    def _links_changed(self, _: int = 0) -> None:
        assert self._attachment is not None
        if self._attachment.drain() and (self._looking is None or not self._looking.pending):
            self._looking = self._loop.call_at(self._loop.now + LINKS_AFTER, self.attach)
