"""Puts the rules of a RuleSpec into the kernel and takes them out again; it touches no other
program's.

There are three ways in, and the first that works on this kernel is taken: nft with its own `queue`;
nft with the NFQUEUE target of iptables, which nft shows but doesn't make, so that rule is a message
of ours; or iptables with that target (through nf_tables or the older interface, whichever tool
serves).  What works is found out by doing it: the very rules are installed in a network namespace
that is made for the purpose and gone a moment later.  Only where a namespace can't be made are they
tried on the host; all ways are atomic, so a refused attempt leaves nothing.

Merely looking can leave something, too: the older iptables makes a table when it is asked what is
in it, and iptables over nf_tables leaves its base chains behind when the last rule is gone.  So
tables are listed only where they are, and those that are empty after our removal are removed as
well.
"""

import ctypes
import errno
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any, Protocol

from knet.netlink import nftables
from knet.rules import iptables, kernel
from knet.rules.run import PASSING, RulesAbsent, RulesDelayed, RulesUnavailable, run
from krelay.rules import ruleset
from krelay.rules.spec import RuleSpec, instance_name, openings
from krelay.rules.steprows import OFFLOADED, OPENINGS, WORKER
from procfs_sim.tree import DEFAULT_ROOT

NO_MAPS = "that needs nft, and a kernel that has its sets"
"""Why every packet visits the queue where Backend.has_maps is false."""
_CLONE_NEWNET = 0x40000000
"""linux/sched.h"""
_PROBE = RuleSpec(
    name="krelay-probe",
    queue=0,
    tcp=((80, 81), (443, 443)),
    udp=((53, 53),),
    gports=(16000,),
    servers=(IPv4Address("192.0.2.1"),),
    relay_clients=(IPv4Network("192.0.2.0/24"),),
    room=1024,
    lets_offloaded_pass=True,
    any_port=((69, 69),),
    asked_within=300,
    tells_unmatched=True,
)


_PROBE_WITHOUT_MAPS = replace(
    _PROBE,
    room=0,
    lets_offloaded_pass=False,
    asked_within=0,
    tells_unmatched=False,
)


_LOCK_WITHIN = 1
"""Seconds for that lock.  Packets wait meanwhile; it is tried again."""


def instance(root: Path) -> str:
    """The name of the rules of the krelay that serves this tree, however the tree is spelt."""
    return instance_name(os.path.realpath(root), os.path.realpath(DEFAULT_ROOT))


class Backend(Protocol):
    """One way to have rules."""

    @property
    def name(self) -> str: ...

    @property
    def has_maps(self) -> bool:
        """Whether flows can be offloaded (krelay/offload)."""

    def install(self, spec: RuleSpec, *, afresh: bool = True) -> None:
        """Puts the rules in, in place of earlier ones of that name.  Raises RulesUnavailable.

        Not `afresh`: in place of those that are there; hooks and what waits in the queues stay, and
        the set of who has asked.
        """

    def remove(self, name: str) -> None:
        """Takes them out, if they are there.  Raises RulesUnavailable."""

    def present(self, name: str) -> bool:
        """Whether rules of that name are there.  Raises RulesUnavailable if that can't be told."""

    def intact(self, spec: RuleSpec, *, asks: bool = False) -> bool:
        """Whether as many rules are there as `install` puts in, where they are seen by packets;
        `asks`: and the one that asks a program (krelay/offload).

        Raises RulesUnavailable.
        """

    def tables(self, name: str) -> frozenset[str]:
        """The tables of nf_tables that hold the rules: a watcher of these is told of changes.

        None for the older interface, which announces nothing.
        """


@dataclass(frozen=True, slots=True)
class Nft:
    """Rules in a table of our own."""

    with_xt: bool = False
    """Whether the rules that queue are those of iptables' target, for want of nft's own."""
    has_maps: bool = True
    """Whether this kernel takes the rules of offloaded flows: RuleSpec.room."""

    @property
    def name(self) -> str:
        """With the target it needs."""
        name = "nft with NFQUEUE" if self.with_xt else "nft"
        return name if self.has_maps else f"{name}, without maps"

    def install(self, spec: RuleSpec, *, afresh: bool = True) -> None:
        """One transaction; with NFQUEUE a second, until which what is to be queued is dropped."""
        run(("nft", "-f", "-"), ruleset.nft_install(spec, afresh=afresh, with_xt=self.with_xt))
        if self.with_xt and afresh:
            try:
                kernel.transaction(
                    nftables.queue_rule(spec.name, WORKER, spec.queue),
                    nftables.queue_rule(spec.name, OPENINGS, openings(spec.queue)),
                )
            except OSError as error:
                self.remove(spec.name)
                # ENOENT: the table that was just made has been taken out by another program.
                passes = error.errno in (*PASSING, errno.ENOENT)
                kind = RulesDelayed if passes else RulesUnavailable
                raise kind(f"the NFQUEUE target in nf_tables: {error}") from None

    def remove(self, name: str) -> None:
        """One transaction."""
        if self.present(name):
            try:
                kernel.transaction(nftables.delete_table(name))
            except OSError:
                run(("nft", "-f", "-"), ruleset.nft_remove(name))

    def present(self, name: str) -> bool:
        """Whether the table is there."""
        if (told := kernel.has_chain(name, "pre")) is not None:
            return told
        try:
            run(("nft", "list", "chain", "ip", name, "pre"))
        except RulesAbsent:
            return False
        return True

    def intact(self, spec: RuleSpec, *, asks: bool = False) -> bool:
        """By the number of rules in each chain."""
        if not self.present(spec.name):
            return False
        shown = json.loads(run(("nft", "-j", "--terse", "list", "table", "ip", spec.name)))
        found = Counter(e["rule"]["chain"] for e in shown["nftables"] if "rule" in e)
        wanted = ruleset.nft_rules(spec, with_xt=self.with_xt)
        beside = ({WORKER, OPENINGS} if self.with_xt else set()) | ({OFFLOADED} if asks else set())
        return found == Counter(
            {chain: len(rules) + (chain in beside) for chain, rules in wanted.items()}
        )

    def tables(self, name: str) -> frozenset[str]:
        """The one."""
        return frozenset({name})


@dataclass(frozen=True, slots=True)
class Iptables:
    """Rules in chains of our own, hung into PREROUTING and POSTROUTING."""

    name: str
    """`iptables`, or `iptables-legacy` or `iptables-nft` where those are told apart."""

    @property
    def has_maps(self) -> bool:
        """No."""
        return False

    def install(self, spec: RuleSpec, *, afresh: bool = True) -> None:
        """One commit a table; see ruleset.  If the second is refused, the first is taken back.

        Rules have no labels where the kernel, or the tool, has no `comment` match.
        """
        hung, _ = self._found(spec.name)
        try:
            self._restore(ruleset.iptables_install(spec, hung))
        except RulesDelayed:
            self.remove(spec.name)
            raise
        except RulesUnavailable:
            self.remove(spec.name)
            self._install_unlabelled(spec)

    def _install_unlabelled(self, spec: RuleSpec) -> None:
        try:
            self._restore(iptables.unlabelled(ruleset.iptables_install(spec, frozenset())))
        except RulesUnavailable:
            self.remove(spec.name)
            raise

    def remove(self, name: str) -> None:
        """PREROUTING first, so that nothing new begins."""
        hung, present = self._found(name)
        if present:
            self._restore(ruleset.iptables_remove(name, hung, present))
            if not self.is_legacy:
                for chain in ruleset.chains(name):
                    _remove_empty_table(chain.table)

    def present(self, name: str) -> bool:
        """Whether one of the chains is there."""
        try:
            return bool(self._found(name)[1])
        except RulesAbsent:
            return False

    def intact(self, spec: RuleSpec, *, asks: bool = False) -> bool:
        """By the number of rules in each chain, and the jump to it."""
        for chain, rules in zip(
            ruleset.chains(spec.name), ruleset.iptables_rules(spec), strict=True
        ):
            if self.is_legacy and chain.table not in legacy_tables():
                return False
            lines = run((f"{self.name}-save", "-t", chain.table)).splitlines()
            jump = f"-A {chain.builtin} -j {chain.name}"
            if jump not in lines:
                return False
            if sum(line.startswith(f"-A {chain.name} ") for line in lines) != len(rules):
                return False
        return True

    def tables(self, name: str) -> frozenset[str]:
        """Those of our chains."""
        if self.is_legacy:
            return frozenset()
        return frozenset(chain.table for chain in ruleset.chains(name))

    @property
    def is_legacy(self) -> bool:
        """Whether this tool is the older interface, not the one over nf_tables."""
        return "legacy" in _version(self.name)

    def _restore(self, text: str) -> None:
        run((f"{self.name}-restore", "--noflush", "-w", str(_LOCK_WITHIN)), text)

    def _found(self, name: str) -> tuple[frozenset[str], frozenset[str]]:
        """The chains of ours that are jumped to, and those that exist."""
        hung, present = set(), set()
        if not shutil.which(f"{self.name}-save"):
            return frozenset(), frozenset()
        for chain in ruleset.chains(name):
            if self.is_legacy and chain.table not in legacy_tables():
                continue
            lines = run((f"{self.name}-save", "-t", chain.table)).splitlines()
            if any(line.startswith(f":{chain.name} ") for line in lines):
                present.add(chain.name)
            if f"-A {chain.builtin} -j {chain.name}" in lines:
                hung.add(chain.name)
        return frozenset(hung), frozenset(present)


CANDIDATES: tuple[Backend, ...] = (
    Nft(),
    Nft(has_maps=False),
    Nft(with_xt=True),
    Nft(with_xt=True, has_maps=False),
    Iptables("iptables"),
    Iptables("iptables-nft"),
    Iptables("iptables-legacy"),
)


def same_rules(one: Backend, other: Backend) -> bool:
    """Whether both see the same rules: `iptables` is another name of iptables-nft or -legacy."""
    if isinstance(one, Iptables) and isinstance(other, Iptables):
        return one.is_legacy == other.is_legacy
    return isinstance(one, Nft) and isinstance(other, Nft)


def places(name: str) -> Sequence[Backend]:
    """One of CANDIDATES for each place where rules of that name can be: several look into the same.

    Those of iptables only if there may be any: each of its tools must be asked what it is.
    """
    found: list[Backend] = []
    for backend in CANDIDATES:
        if isinstance(backend, Iptables) and not _may_have_chains(name):
            continue
        with suppress(RulesUnavailable):  # its tool can't be asked what it is
            if any(same_rules(backend, other) for other in found):
                continue
        found.append(backend)
    return found


def probe() -> Backend:
    """The first way that works here.  Raises RulesUnavailable if none does.

    RulesDelayed if that can't be said now: a worse way isn't taken for that.
    """
    found: list[Backend] = []
    failed: list[RulesUnavailable] = []

    def attempt() -> None:
        if not _leave_for_a_new_namespace():
            return
        try:
            found.append(_first_way())
        except RulesUnavailable as error:
            failed.append(error.with_traceback(None))

    # Of a thread's own: the rest of the process stays, and the namespace ends with the thread.
    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    if failed:
        raise failed.pop()  # not left in this frame, which the error holds
    return found[0] if found else _probe_on_the_host()


def _probe_on_the_host() -> Backend:
    """Where no namespace can be had."""
    try:
        return _first_way()
    finally:
        for backend in places(_PROBE.name):
            with suppress(RulesUnavailable):
                backend.remove(_PROBE.name)


def _first_way() -> Backend:
    """Leaves the rules that it tried.  Raises as `probe`."""
    tried = []
    has_queue = kernel.has_queue(_PROBE.name)
    for backend in CANDIDATES:
        reason: object = "the kernel has no `queue` in nf_tables"
        is_hopeless = isinstance(backend, Nft) and not (backend.with_xt or has_queue)
        if not is_hopeless:
            try:
                backend.install(_PROBE if backend.has_maps else _PROBE_WITHOUT_MAPS)
            except RulesDelayed:
                raise
            except RulesUnavailable as error:
                reason = error
            else:
                return backend
        tried.append(f"{backend.name}: {reason}")
    raise RulesUnavailable(
        "no way to queue packets: neither nft's queue nor the NFQUEUE target of iptables works "
        f"here ({'; '.join(tried)}); install nftables or iptables, and a kernel with one of them"
    )


def _leave_for_a_new_namespace() -> bool:
    """Moves this thread to a network namespace of its own; whether that was allowed."""
    return not ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET)


def _may_have_chains(name: str) -> bool:
    """Whether iptables, through either interface, may have rules of that name."""
    return any(
        chain.table in legacy_tables() or kernel.has_chain(chain.table, chain.name) is not False
        for chain in ruleset.chains(name)
    )


@cache
def _version(command: str) -> str:
    """What the tool says of itself: `iptables v1.8.9 (nf_tables)`."""
    return run((command, "--version"))


def legacy_tables() -> list[str]:
    """The tables of the older interface that exist in this network namespace."""
    try:
        return Path("/proc/thread-self/net/ip_tables_names").read_text().split()
    except OSError:
        return []


def _remove_empty_table(table: str) -> None:
    """Removes an iptables table that holds nothing but its empty base chains.

    In one transaction that the kernel refuses if a rule was put there meanwhile.
    """
    try:
        listed = json.loads(run(("nft", "-j", "list", "table", "ip", table)))["nftables"]
    except (RulesUnavailable, ValueError, KeyError):
        return
    chains: list[dict[str, Any]] = [entry["chain"] for entry in listed if "chain" in entry]
    kinds = {kind for entry in listed for kind in entry}
    empty = all("hook" in chain and chain.get("policy") == "accept" for chain in chains)
    if not empty or kinds - {"metainfo", "table", "chain"}:
        return
    lines = [f"delete chain ip {table} {chain['name']}" for chain in chains]
    with suppress(RulesUnavailable):  # in use after all
        run(("nft", "-f", "-"), "\n".join([*lines, f"delete table ip {table}", ""]))
