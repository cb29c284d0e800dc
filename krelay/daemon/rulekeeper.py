"""The rules: made, changed with the config, the flows and the links, and put back if taken out.

A change that isn't possible now is tried again within a second; where rules can't be made at all,
relaying fails.  What another program takes out is announced by the kernel (rules/watch.py), or
looked for at times where nothing is announced, and put back at once.
"""

import select
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from knet.log import Failures, Log, Throttle
from knet.loop import Loop, Timer
from knet.rules.run import RulesDelayed, RulesUnavailable
from knet.rules.watch import RuleWatcher
from krelay.daemon import apply
from krelay.datapath.policy import Policy
from krelay.host import netfilter
from krelay.host.hostview import HostView
from krelay.host.netfilter import Backend
from krelay.nat.table import NatTable
from krelay.offload.service import Offload
from krelay.rules.spec import RuleSpec
from procfs_sim.tree import Config

LOOK_AFTER = 0.02
"""Seconds between the news that rules were taken out and the look at ours."""
LOOK_EVERY = 5.0
"""Seconds between looks where the kernel announces no changes."""
RETRY = 1.0
"""Seconds until what the host had no room for is tried again."""
REMOVE_AFTER = (0.0, 0.02, 0.05, 0.1, 0.2)
"""Seconds before each try to take rules out: no program serves the packets that they catch."""

_log = Log("relaying")


class InForceNow(NamedTuple):
    """What the rules are made of, beside the flows."""

    config: Config
    policy: Policy | None
    view: HostView
    gport: int


class RuleKeeper:
    """Keeps the rules as they must be, from `begin` until `freeze` or `end`.

    `now` tells what is in force; `failed` is called with the reason when rules can't be made any
    more, `restored` when they were put back.  `name` is that of the tables or chains.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        queue: int,
        nat: NatTable,
        kernel: Offload,
        now: Callable[[], InForceNow],
        failed: Callable[[str], object],
        restored: Callable[[], object],
        failures: Failures,
    ) -> None:
        self.no_maps = ""
        """Why no flow is offloaded though that is wished."""
        self.backend: Backend | None = None
        """By what rules are made; None: it isn't known, or by nothing."""
        self._loop = loop
        self._name = name
        self._queue = queue
        self._nat = nat
        self._kernel = kernel
        self._now = now
        self._failed = failed
        self._restored = restored
        self._failures = failures
        self._is_kept = False
        self._spec: RuleSpec | None = None
        """The rules that are in; None: those are to be made afresh."""
        self._made_for: tuple[object, ...] = ()
        self._are_missing = False
        """Whether another program has taken rules out, and they aren't put back yet."""
        self._watcher: RuleWatcher | None = None
        self._looking: Timer | None = None
        self._look_at: float | None = None
        """When to look for our rules unasked; None: the kernel announces changes."""
        self._removal_warning = Throttle()
        self._delay_warning = Throttle()

    @property
    def made_by(self) -> str:
        """By what the rules are made: `nft`, `iptables`, or `none`."""
        return self.backend.name if self.backend else "none"

    def clear_stale(self, start: bool) -> None:
        """Finds out how rules can be made, and removes those that a killed krelay left.

        Those that are to be replaced in one step (`start`, and made the same way) stay.
        """
        self.probe()
        for backend in netfilter.places(self._name):
            with suppress(RulesUnavailable):
                if not backend.present(self._name):
                    continue
                if start and self.backend and netfilter.same_rules(backend, self.backend):
                    continue
                backend.remove(self._name)
                _log.info("stale rules removed", rules=backend.name)

    def probe(self) -> Backend | None:
        """Finds out how rules can be made; where they can't, that is told to `failed`."""
        try:
            self.backend = netfilter.probe()
        except RulesUnavailable as error:
            self._failed(str(error))
        return self.backend

    def begin(self) -> None:
        """Puts the rules in, and keeps them.  Raises RulesUnavailable."""
        assert self.backend is not None
        self._is_kept = True
        self._are_missing = False
        self._watch(self.backend)
        self._install(self._wanted(), afresh=True)

    def freeze(self) -> None:
        """The rules stay as they are from now on: relaying is about to end."""
        self._is_kept = False

    def end(self) -> None:
        """Keeps them no more; they stay until `remove`."""
        self._is_kept = False
        self._spec = self._look_at = None
        if (watcher := self._watcher) is not None:
            self._watcher = None
            with self._failures.going_on(self._loop.now):
                self._loop.remove(watcher.fileno())
                watcher.close()

    def remove(self) -> None:
        """Takes them out."""
        if self.backend is None:
            return
        for wait in REMOVE_AFTER:
            with self._failures.going_on(self._loop.now):
                time.sleep(wait)
            try:
                self.backend.remove(self._name)
                return
            except RulesDelayed as error:
                reason = str(error)
            except RulesUnavailable as error:
                reason = str(error)
                break
        _log.error("rules can't be removed", reason=reason, fix="krelay clean")

    def is_stale(self) -> bool:
        """Whether rules of a killed krelay are in.  Raises RulesUnavailable."""
        return self.backend is not None and self.backend.present(self._name)

    def on_time(self, now: float) -> None:
        """What is done once a second: changes that weren't possible, looks for rules of ours."""
        if self._spec is None or self._made_for != self._depends_on():
            self.refresh()
        if self._look_at is not None and now >= self._look_at:
            self._look_at = now + LOOK_EVERY
            self._restore()

    def refresh(self) -> None:
        """Changes the rules if the config, the flows or the links need others."""
        if not self._is_kept or self.backend is None:
            return
        depends_on = self._depends_on()
        spec = self._wanted()
        if spec == self._spec:
            self._made_for = depends_on
            self._learn()
            return
        try:
            self._install(spec, afresh=self._spec is None)
        except RulesDelayed as error:
            self._delayed(error)
        except RulesUnavailable as error:
            self._failed(f"rules can't be changed: {error}")

    def _wanted(self) -> RuleSpec:
        now, backend = self._now(), self.backend
        room, self.no_maps = self._kernel.capacity(now.config, backend)
        return apply.rules(
            now.config,
            now.view,
            now.gport,
            self._nat.footprints,
            name=self._name,
            queue=self._queue,
            room=room,
            has_maps=backend is not None and backend.has_maps,
            tells_unmatched=self._kernel.events.tells_unmatched,
        )

    def _depends_on(self) -> tuple[object, ...]:
        """What `_wanted` is made of: as long as that stays, it needn't be made again every second.

        To make it costs some hundred objects, whose memory the interpreter keeps for a while.
        """
        now, kernel = self._now(), self._kernel
        condition = kernel.condition(now.config)
        told = kernel.events.tells_unmatched
        return *now, self.backend, self._nat.footprint_changes, condition, told

    def _learn(self) -> None:
        """Says which queries begin flows by themselves: that follows the config, as rules do."""
        now = self._now()
        self._kernel.queries.learn(now.config, now.policy)

    def _install(self, spec: RuleSpec, *, afresh: bool) -> None:
        """Puts these rules in force; `afresh` their chains, too.  Raises RulesUnavailable."""
        assert self.backend is not None
        if self._spec is None or spec.learnt_to != self._spec.learnt_to:
            self._kernel.queries.rest()  # until the rules lead there
        if afresh:
            self._spec = None  # if this fails, the next try is to make all of it
        self.backend.install(spec, afresh=afresh)
        self._spec = spec
        self._kernel.enter(spec, afresh=afresh)
        self._learn()
        self._announced(ours=True)
        if self._are_missing:
            self._put_back()

    def _delayed(self, error: RulesDelayed) -> None:
        """The rules stay as they are; within a second it is tried again (on_time)."""
        if (before := self._delay_warning.admit(self._loop.now)) is not None:
            _log.warning(
                "rules can't be changed now; trying again", reason=error, again=before or None
            )

    # Rules that another program takes out

    def _watch(self, backend: Backend) -> None:
        self._look_at = self._loop.now + LOOK_EVERY
        if not backend.tables(self._name):
            return
        try:
            self._watcher = RuleWatcher()
        except OSError as error:
            _log.info("changes of rules aren't announced; looking at times", error=error)
            return
        self._look_at = None
        self._loop.add(self._watcher.fileno(), select.EPOLLIN, self._announced)

    def _announced(self, _: int = 0, *, ours: bool = False) -> None:
        """Rules were changed; `ours`: by us, so what is announced is known already."""
        if self._watcher is None or self.backend is None:
            return
        tables = self._watcher.drain()
        if ours or (tables is not None and not tables & self.backend.tables(self._name)):
            return
        if self._looking is None or not self._looking.pending:
            when = self._loop.now + LOOK_AFTER
            self._looking = self._loop.call_at(when, self._restore)

    def _restore(self) -> None:
        """Puts our rules back if some were taken out: to have them out, `start` is written."""
        if not self._is_kept or self.backend is None or self._spec is None:
            return
        try:
            if self.backend.intact(self._spec, asks=self._kernel.is_asked):
                return
            self._spec = None  # there is nothing to go by
            self._are_missing = True
            self._install(self._wanted(), afresh=True)
        except RulesDelayed as error:  # of what is missing on_time has another try
            self._delayed(error)
            self._loop.call_at(self._loop.now + RETRY, self._restore)
        except RulesUnavailable as error:
            self._failed(f"krelay's rules were taken out, and they can't be put back: {error}")

    def _put_back(self) -> None:
        """The rules that were taken out are in again, now or after some tries."""
        self._are_missing = False
        if (before := self._removal_warning.admit(self._loop.now)) is not None:
            _log.warning(
                "krelay's rules were taken out; they are put back",
                again=before or None,
                fix="to stop relaying, krelay stop",
            )
        self._restored()
