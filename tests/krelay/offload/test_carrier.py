"""The rule that asks the programs: one, while they are attached, and none without."""

import errno
import os
from collections.abc import Iterator
from random import Random

import pytest

from knet.netlink import nftables
from krelay.host import attachment
from krelay.nat.table import NatTable
from krelay.offload import carrier as carriers
from krelay.offload.backend import OffloadLost
from krelay.offload.carrier import READ_AFTER, Carrier
from krelay.offload.service import Offload
from krelay.rules.offloaded import MARK
from krelay.rules.spec import RuleSpec
from tests.tools.stepped import SteppedLoop

NAME, PROGRAM, TOLD = "krelay", 7, 55
CLEARED = nftables.delete_rules(NAME, "offloaded")
ASKS = nftables.program_rule(NAME, "offloaded", PROGRAM, MARK)


class FakeBackend:
    """One whose programs are loaded; it has nothing."""

    def __init__(self, capacity: int = 1024, learnt: int = 0) -> None:
        self.capacity = capacity
        self.descriptor = PROGRAM
        self.programs = {"passes": self}
        self.links: dict[int, int] | None = None
        self.told: list[object] = []
        self.lost = 0

    def attached(self, links: dict[int, int]) -> None:
        self.links = links

    def own_packets(self) -> list[object]:
        return []

    def leave(self, rewrites: object) -> list[object]:
        return []

    def totals(self) -> dict[object, int]:
        return {}

    def learn(self, learning: object) -> None:
        pass

    def exchanges(self) -> list[object]:
        told, self.told = self.told, []
        return told

    def fileno(self) -> int:
        return TOLD

    def close(self) -> None:
        pass


class FakeAttachment:
    """Links, or the error that the next call raises."""

    def __init__(self, name: str = NAME) -> None:
        self.found: dict[int, int] | OSError = {2: 1500}

    def fileno(self) -> int:
        return 99

    def attach_all(self, programs: object) -> dict[int, int]:
        if isinstance(self.found, OSError):
            raise self.found
        return self.found

    def close(self) -> None:
        pass


class Rig:
    """A carrier, and what was told to nf_tables."""

    def __init__(self, loop: SteppedLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = loop
        self.told: list[tuple[bytes, ...]] = []
        self.fails: list[OSError] = []
        self.refused: list[str] = []
        self.has_chain: bool | None = True
        self.links = FakeAttachment()
        monkeypatch.setattr(carriers, "transaction", self._transaction)
        monkeypatch.setattr(carriers, "has_chain", lambda *where: self.has_chain)
        monkeypatch.setattr(carriers, "TcBackend", FakeBackend)
        monkeypatch.setattr(carriers, "Attachment", lambda name: self.links)
        monkeypatch.setattr(attachment, "detach", lambda name: [])
        self.heard: list[object] = []
        self.carrier = Carrier(loop, NAME, self.refused.append, self._lost, self.heard.append)

    def _lost(self, error: OffloadLost) -> None:
        pytest.fail(str(error))

    def _transaction(self, *messages: bytes) -> None:
        if self.fails:
            raise self.fails.pop(0)
        self.told.append(messages)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    with SteppedLoop() as loop:
        yield Rig(loop, monkeypatch)


def spec(room: int = 1024, udp: tuple[tuple[int, int], ...] = ()) -> RuleSpec:
    return RuleSpec(
        name=NAME,
        queue=7,
        tcp=((80, 80),),
        udp=udp,
        gports=(),
        servers=(),
        relay_clients=(),
        room=room,
        lets_offloaded_pass=True,
    )


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def test_a_rule_asks_when_the_programs_are_attached_and_once(rig: Rig) -> None:
    rig.carrier.make(1024)
    assert (rig.told, rig.carrier.is_asked) == ([], False)
    rig.carrier.attach()
    rig.carrier.attach()
    assert (rig.told, rig.carrier.is_asked) == ([(CLEARED, ASKS)], True)
    rig.carrier.ask_no_more()
    rig.carrier.ask_no_more()
    assert (rig.told[1:], rig.carrier.is_asked) == ([(CLEARED,)], False)


def test_no_rule_asks_while_the_programs_can_not_be_attached(rig: Rig) -> None:
    rig.links.found = failure(errno.ENOBUFS)
    rig.carrier.make(1024)
    rig.carrier.attach()
    assert (rig.told, rig.refused) == ([], [])
    rig.links.found = {3: 1400}
    rig.loop.advance(1.0)
    assert rig.told == [(CLEARED, ASKS)]
    assert isinstance(rig.carrier.backend, FakeBackend)
    assert rig.carrier.backend.links == {3: 1400}


@pytest.mark.parametrize(
    ("number", "has_chain", "is_for_good"),
    [
        (errno.ENOENT, True, True),
        (errno.ENOENT, None, True),
        (errno.ENOENT, False, False),  # another program has taken the rules out
        (errno.ENOMEM, True, False),
    ],
)
def test_a_rule_that_is_refused_is_told_of_unless_that_may_pass(
    rig: Rig, number: int, has_chain: bool | None, is_for_good: bool
) -> None:
    rig.fails, rig.has_chain = [failure(number)], has_chain
    rig.carrier.make(1024)
    rig.carrier.attach()
    assert (bool(rig.refused), rig.carrier.is_asked) == (is_for_good, False)


def test_what_is_told_is_read_by_and_by_while_there_is_any(rig: Rig) -> None:
    rig.carrier.make(1024)
    backend = rig.carrier.backend
    assert isinstance(backend, FakeBackend)
    for exchanges in (["query"], ["query", "answer"]):
        backend.told = list(exchanges)
        rig.loop.handlers[TOLD](1)
        assert (rig.heard, TOLD in rig.loop.handlers) == ([], False), "the next wake nobody"
        rig.loop.advance(READ_AFTER)
        assert rig.heard == [exchanges]
        rig.heard.clear()
        rig.loop.advance(READ_AFTER)
        assert (rig.heard, TOLD in rig.loop.handlers) == ([], True)


@pytest.mark.parametrize("is_read", [False, True])
def test_nothing_is_read_of_what_has_gone(rig: Rig, is_read: bool) -> None:
    rig.carrier.make(1024)
    if is_read:
        rig.loop.handlers[TOLD](1)
    rig.carrier.drop()
    assert TOLD not in rig.loop.handlers
    rig.loop.advance(60)
    assert rig.heard == []


# With the rules


def offload(rig: Rig) -> Offload:
    made = Offload(rig.loop, NatTable(rng=Random(1)), NAME, 7, lambda: None)
    made._carrier = rig.carrier
    return made


def test_rules_that_are_made_afresh_have_one_that_asks(rig: Rig) -> None:
    """The chain of that rule stays where hooks stay."""
    kernel = offload(rig)
    for _ in range(2):
        kernel.enter(spec(), afresh=True)
    assert rig.told == [(CLEARED, ASKS)] * 2
    kernel.enter(spec(udp=((53, 53),)), afresh=False)
    assert len(rig.told) == 2


def test_no_rule_asks_what_is_about_to_go(rig: Rig) -> None:
    kernel = offload(rig)
    kernel.enter(spec(), afresh=True)
    kernel.enter(spec(room=2048), afresh=True)
    assert rig.told == [(CLEARED, ASKS), (CLEARED,), (CLEARED, ASKS)]
    kernel.enter(spec(room=0), afresh=True)
    assert rig.told[3:] == [(CLEARED,)]
    assert not rig.carrier.is_asked
