"""The rules that are kept: when they are made, afresh or in place of others, and put back."""

import errno
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address
from random import Random
from typing import cast

import pytest

from knet.endpoint import Source
from knet.log import Failures, Log
from knet.rules.run import RulesDelayed, RulesUnavailable
from krelay.daemon import rulekeeper
from krelay.daemon.rulekeeper import (
    LOOK_AFTER,
    LOOK_EVERY,
    REMOVE_AFTER,
    RETRY,
    InForceNow,
    RuleKeeper,
)
from krelay.datapath.policy import Policy
from krelay.host import netfilter
from krelay.host.hostview import HostView
from krelay.host.netfilter import Backend
from krelay.nat.table import NatTable
from krelay.offload.service import Offload
from krelay.rules.spec import RuleSpec
from procfs_sim.tree import Config, parse
from tests.tools.logs import complaints, fields
from tests.tools.packets import at, policy
from tests.tools.stepped import SteppedLoop

NAME = "krelay"
ANNOUNCED = 5
"""The descriptor of the watcher."""
PUT_BACK = "krelay's rules were taken out; they are put back"
DELAYED = "rules can't be changed now; trying again"
VIEW = HostView(policy().own, policy().beside, None, True)


@dataclass
class FakeBackend:
    """A packet filter with the rules of one table, or none."""

    done: list[str]
    name: str = "nft"
    has_maps: bool = True
    tables_watched: frozenset[str] = frozenset({NAME})
    spec: RuleSpec | None = None
    asks: bool = False
    """Whether a rule asks a program."""
    is_stale: bool = False
    fails: list[Exception] = field(default_factory=list)
    """The next calls that install, look or remove raise these."""

    def _may_fail(self) -> None:
        if self.fails:
            raise self.fails.pop(0)

    def install(self, spec: RuleSpec, *, afresh: bool = True) -> None:
        self._may_fail()
        self.done.append("rules afresh" if afresh else "rules")
        self.spec = spec
        self.asks = self.asks and not afresh

    def remove(self, name: str) -> None:
        assert name == NAME
        self._may_fail()
        self.done.append(f"{self.name} removed")
        self.spec, self.is_stale = None, False

    def present(self, name: str) -> bool:
        assert name == NAME
        self._may_fail()
        return self.is_stale or self.spec is not None

    def intact(self, spec: RuleSpec, *, asks: bool = False) -> bool:
        self._may_fail()
        return self.spec == spec and self.asks == asks

    def tables(self, name: str) -> frozenset[str]:
        assert name == NAME
        return self.tables_watched


@dataclass
class FakeOffload:
    """The offload: says what it may."""

    done: list[str]
    room: int = 1024
    why_none: str = ""
    tells_unmatched: bool = True
    is_asked: bool = False
    learnt: Config | None = None
    """The config by which queries are learnt."""

    @property
    def events(self) -> "FakeOffload":
        return self

    @property
    def queries(self) -> "FakeOffload":
        return self

    def capacity(self, config: Config, backend: Backend | None) -> tuple[int, str]:
        return self.room, self.why_none

    def learn(self, config: Config, policy: Policy | None) -> None:
        self.learnt = config

    def rest(self) -> None:
        self.learnt = None
        self.done.append("no query")

    def condition(self, config: Config) -> object:
        return self.room

    def enter(self, spec: RuleSpec, *, afresh: bool) -> None:
        self.done.append("enter")


class FakeWatcher:
    """Announces what the test has put in `tables`."""

    def __init__(self) -> None:
        self.tables: frozenset[str] | None = frozenset()
        self.is_closed = False

    def fileno(self) -> int:
        return ANNOUNCED

    def drain(self) -> frozenset[str] | None:
        told, self.tables = self.tables, frozenset()
        return told

    def close(self) -> None:
        self.is_closed = True


class Rig:
    """A keeper of rules with a fake packet filter and a fake offload."""

    def __init__(self, loop: SteppedLoop, monkeypatch: pytest.MonkeyPatch) -> None:
        self.loop = loop
        self.done: list[str] = []
        """What was done with the rules and the sets, in order."""
        self.backend, self.offload = FakeBackend(self.done), FakeOffload(self.done)
        self.watcher = FakeWatcher()
        self.failed: list[str] = []
        self.restored = 0
        self.config = Config(services=parse("services", "tcp/80 udp/53"))
        self.nat = NatTable(rng=Random(1))
        self.keeper = RuleKeeper(
            loop,
            NAME,
            1600,
            self.nat,
            cast(Offload, self.offload),
            lambda: InForceNow(self.config, policy(), VIEW, 16000),
            self.failed.append,
            self._restored,
            Failures(Log("relaying")),
        )
        monkeypatch.setattr(rulekeeper, "RuleWatcher", lambda: self.watcher)
        monkeypatch.setattr(netfilter, "probe", lambda: self.backend)
        monkeypatch.setattr(netfilter, "same_rules", lambda one, other: one is other)
        monkeypatch.setattr(netfilter, "places", lambda name: [self.backend])
        monkeypatch.setattr(time, "sleep", lambda seconds: self.done.append("sleep"))

    def _restored(self) -> None:
        self.restored += 1

    def begin(self) -> None:
        self.keeper.probe()
        self.keeper.begin()
        self.done.clear()

    def serve(self, services: str) -> None:
        self.config = replace(self.config, services=parse("services", services))

    def second(self) -> None:
        """A second passes, as it does in the daemon."""
        self.loop.advance(1)
        self.keeper.on_time(self.loop.now)

    def taken_out(self, *tables: str) -> None:
        """Another program takes all rules out, and the kernel announces that of these tables."""
        self.backend.spec = None
        self.announced(*tables)

    def announced(self, *tables: str) -> None:
        """The kernel announces changes of these tables."""
        self.watcher.tables = frozenset(tables)
        self.loop.handlers[ANNOUNCED](1)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    with SteppedLoop() as loop:
        yield Rig(loop, monkeypatch)


# Rules that are changed


def test_rules_come_before_what_the_offload_makes_beside_them(rig: Rig) -> None:
    rig.keeper.probe()
    rig.keeper.begin()

    assert rig.done == ["no query", "rules afresh", "enter"]
    assert rig.backend.spec is not None
    assert (rig.backend.spec.tcp, rig.backend.spec.room) == (((80, 80),), 1024)
    assert rig.keeper.made_by == "nft"


def test_what_stays_is_not_made_again(rig: Rig) -> None:
    rig.begin()
    rig.second()
    rig.keeper.refresh()
    assert rig.done == []


def test_another_service_leaves_the_hooks(rig: Rig) -> None:
    rig.begin()
    rig.serve("tcp/80 tcp/443")

    rig.second()

    assert rig.done == ["rules", "enter"]
    assert rig.backend.spec is not None
    assert rig.backend.spec.tcp == ((80, 80), (443, 443))


def test_queries_are_learnt_by_the_config_in_force(rig: Rig) -> None:
    rig.begin()
    assert rig.offload.learnt is rig.config
    rig.serve("tcp/80 udp/53 udp/123")
    rig.second()
    assert rig.offload.learnt is rig.config


def test_no_query_is_learnt_while_rules_lead_to_a_former_server(rig: Rig) -> None:
    rig.begin()
    rig.config = replace(rig.config, real_ip=IPv4Address("192.168.0.77"))
    rig.second()
    assert rig.done == ["no query", "rules", "enter"]
    assert rig.offload.learnt is rig.config


def test_a_flow_that_needs_a_rule_has_it_within_a_second(rig: Rig) -> None:
    rig.begin()
    rig.nat.open_tcp(at("C:1"), at("K:25"), at("S:25"), Source.CLIENT, 17000, rig.loop.now)

    rig.second()

    assert rig.backend.spec is not None
    assert rig.backend.spec.tcp == ((25, 25), (80, 80))
    assert rig.backend.spec.gports == (16000, 17000)


def test_a_delayed_change_is_tried_again_each_second_and_told_once(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.begin()
    before = rig.backend.spec
    rig.serve("tcp/443")
    rig.backend.fails = [RulesDelayed("no process")] * 3

    for _ in range(3):
        rig.second()
    assert (rig.backend.spec, rig.done) == (before, [])
    assert complaints(caplog) == [DELAYED]

    rig.second()
    assert rig.backend.spec is not None
    assert rig.backend.spec.tcp == ((443, 443),)
    assert rig.failed == []


def test_a_change_that_is_impossible_ends_relaying(rig: Rig) -> None:
    rig.begin()
    rig.serve("tcp/443")
    rig.backend.fails = [RulesUnavailable("no queue")]

    rig.second()

    assert rig.failed == ["rules can't be changed: no queue"]


def test_frozen_rules_stay(rig: Rig) -> None:
    rig.begin()
    rig.keeper.freeze()
    rig.serve("tcp/443")

    rig.second()
    rig.taken_out(NAME)
    rig.loop.advance(LOOK_AFTER)

    assert (rig.done, rig.restored) == ([], 0)


# Rules that another program takes out


def test_a_rule_that_asks_programs_is_among_those_that_must_be_there(rig: Rig) -> None:
    rig.begin()
    rig.offload.is_asked = rig.backend.asks = True
    rig.announced(NAME)
    rig.loop.advance(LOOK_AFTER)
    assert (rig.done, rig.restored) == ([], 0)

    rig.backend.asks = False
    rig.announced(NAME)
    rig.loop.advance(LOOK_AFTER)

    assert rig.done == ["no query", "rules afresh", "enter"]
    assert rig.restored == 1


def test_rules_that_are_taken_out_are_put_back_and_the_flows_are_told(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.begin()
    rig.taken_out("filter", NAME)
    assert rig.done == [], "what else is taken out by the same program comes first"

    rig.loop.advance(LOOK_AFTER)

    assert rig.done == ["no query", "rules afresh", "enter"]
    assert rig.restored == 1
    assert complaints(caplog) == [PUT_BACK]

    rig.serve("tcp/443")
    rig.second()
    assert rig.restored == 1, "another change puts nothing back"


def test_own_removals_lead_to_no_look(rig: Rig) -> None:
    rig.begin()
    rig.watcher.tables = frozenset({NAME})  # as a change of ours is announced
    rig.serve("tcp/443")
    rig.second()
    rig.done.clear()
    rig.backend.spec = None  # a look would find this

    rig.loop.advance(LOOK_EVERY)
    rig.keeper.on_time(rig.loop.now)

    assert rig.done == [], "and no look comes unasked where changes are announced"


def test_of_many_announcements_one_look_comes(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.begin()
    for _ in range(3):
        rig.taken_out(NAME)
    rig.loop.advance(LOOK_AFTER)
    rig.taken_out(NAME)
    rig.loop.advance(LOOK_AFTER)

    assert rig.restored == 2
    assert len(fields(caplog, PUT_BACK)) == 1, "within seconds"


def test_other_tables_are_not_looked_for(rig: Rig) -> None:
    rig.begin()
    rig.taken_out("filter")
    rig.loop.advance(LOOK_AFTER)
    assert rig.done == []


def test_lost_announcements_may_have_been_of_ours(rig: Rig) -> None:
    rig.begin()
    rig.backend.spec, rig.watcher.tables = None, None
    rig.loop.handlers[ANNOUNCED](1)

    rig.loop.advance(LOOK_AFTER)

    assert rig.restored == 1


def test_where_nothing_is_announced_rules_are_looked_for(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_socket() -> FakeWatcher:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(rulekeeper, "RuleWatcher", no_socket)
    rig.begin()
    assert rig.loop.handlers == {}
    for turn in range(2):
        rig.backend.spec = None
        for _ in range(int(LOOK_EVERY) - 1):
            rig.second()
        assert rig.restored == turn
        rig.second()
        assert rig.restored == turn + 1


def test_a_look_that_is_delayed_is_tried_again(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    rig.begin()
    rig.backend.fails = [RulesDelayed("no process")]
    rig.taken_out(NAME)
    rig.loop.advance(LOOK_AFTER)
    assert rig.restored == 0

    rig.loop.advance(RETRY)

    assert rig.restored == 1
    assert complaints(caplog) == [DELAYED, PUT_BACK]


def test_flows_are_told_too_when_rules_are_put_back_late(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.begin()
    rig.taken_out(NAME)
    install = rig.backend.install

    def fails_once(*_: object, **__: object) -> None:
        rig.backend.install = install  # type: ignore[method-assign]
        raise RulesDelayed("no process")

    rig.backend.install = fails_once  # type: ignore[method-assign]
    rig.loop.advance(LOOK_AFTER)
    assert (rig.backend.spec, rig.restored) == (None, 0)

    for _ in range(3):
        rig.second()

    assert rig.backend.spec is not None
    assert rig.restored == 1
    assert complaints(caplog) == [DELAYED, PUT_BACK]


def test_rules_that_can_not_be_put_back_end_relaying(rig: Rig) -> None:
    rig.begin()
    rig.backend.fails = [RulesUnavailable("no nft")]
    rig.taken_out(NAME)

    rig.loop.advance(LOOK_AFTER)

    assert rig.failed == [
        "krelay's rules were taken out, and they can't be put back: no nft",
    ]


# The end, and what a killed krelay left


def test_at_the_end_nothing_is_watched_and_the_rules_stay(rig: Rig) -> None:
    rig.begin()
    rig.keeper.end()

    assert rig.watcher.is_closed
    assert rig.loop.handlers == {}
    assert rig.backend.spec is not None
    rig.second()
    assert rig.done == []


def test_removal_is_tried_while_the_host_may_recover(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.begin()
    rig.backend.fails = [RulesDelayed("no process")] * (len(REMOVE_AFTER) - 1)
    rig.keeper.remove()
    assert rig.backend.spec is None
    assert rig.done.count("sleep") == len(REMOVE_AFTER)
    assert complaints(caplog) == []


@pytest.mark.parametrize(
    ("fails", "tries"),
    [
        ([RulesDelayed("no process")] * len(REMOVE_AFTER), len(REMOVE_AFTER)),
        ([RulesUnavailable("no process")], 1),
    ],
    ids=["too long", "impossible"],
)
def test_rules_that_stay_are_told_with_what_removes_them(
    rig: Rig, caplog: pytest.LogCaptureFixture, fails: list[Exception], tries: int
) -> None:
    rig.begin()
    rig.backend.fails = fails.copy()
    rig.keeper.remove()
    assert rig.done.count("sleep") == tries
    assert fields(caplog, "rules can't be removed") == [
        {"reason": "no process", "fix": "krelay clean"}
    ]


def test_rules_of_a_killed_krelay_go_unless_they_are_replaced(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = FakeBackend(rig.done, "iptables", is_stale=True)
    absent = FakeBackend(rig.done, "iptables-nft", fails=[RulesUnavailable("no tool")])
    rig.backend.is_stale = True
    places = [absent, rig.backend, others]
    monkeypatch.setattr(netfilter, "places", lambda name: places)

    rig.keeper.clear_stale(start=True)
    assert rig.done == ["iptables removed"]
    assert rig.keeper.is_stale()

    rig.keeper.clear_stale(start=False)
    assert rig.done == ["iptables removed", "nft removed"]
    assert not rig.keeper.is_stale()


def test_a_host_without_any_packet_filter_is_told_of(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing() -> Backend:
        raise RulesUnavailable("no way to queue packets")

    monkeypatch.setattr(netfilter, "probe", nothing)

    assert rig.keeper.probe() is None
    assert rig.failed == ["no way to queue packets"]
    assert rig.keeper.made_by == "none"
    rig.keeper.remove()
    assert rig.done == []
