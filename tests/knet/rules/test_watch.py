"""News of rules that somebody takes out: as bytes, and from the kernel."""

import json
import select
import struct
import subprocess
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.rules import kernel
from knet.rules.run import RulesUnavailable
from knet.rules.watch import RuleWatcher, taken_from
from krelay.host import netfilter
from krelay.host.netfilter import Backend, Iptables
from krelay_vm import Lab
from tests.krelay.host.test_netfilter import SPEC

NEW_RULE, DELETE_TABLE, DELETE_CHAIN, DELETE_RULE, NEW_GENERATION = 6, 2, 5, 8, 15
MINE = "table ip mine {\n chain c {\n type filter hook input priority 0;\n accept\n }\n}\n"


def message(kind: int, table: str, subsystem: int = 10) -> bytes:
    """An announcement; another attribute comes first."""
    name = table.encode() + b"\0"
    attributes = struct.pack("=HHI", 8, 2, 7)
    attributes += struct.pack("=HH", 4 + len(name), 1) + name + b"\0" * (-len(name) % 4)
    body = b"\x02\0\0\0" + attributes
    return struct.pack("=IHHII", 16 + len(body), subsystem << 8 | kind, 0, 0, 0) + body


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([message(DELETE_TABLE, "raw")], ["raw"]),
        ([message(DELETE_CHAIN, "a"), message(DELETE_RULE, "longer-name")], ["a", "longer-name"]),
        ([message(NEW_RULE, "raw"), message(NEW_GENERATION, "x")], []),
        ([message(DELETE_RULE, "raw", subsystem=1)], []),
        ([message(NEW_RULE, "abc"), message(DELETE_RULE, "def")], ["def"]),
        ([b"\0" * 16, message(DELETE_RULE, "raw")], []),
        ([message(DELETE_RULE, "raw")[:10]], []),
    ],
)
def test_what_was_taken_out_is_told_by_table(messages: list[bytes], expected: list[str]) -> None:
    assert list(taken_from(b"".join(messages))) == expected


@given(st.one_of(st.binary(), st.binary().map(lambda tail: message(DELETE_RULE, "a") + tail)))
def test_any_bytes_will_do(data: bytes) -> None:
    assert all(isinstance(table, str) for table in taken_from(data))


@pytest.fixture
def relay() -> Iterator[Lab]:
    """A lab in whose relay host this thread is."""
    with Lab() as lab, lab.enter("relay"):
        yield lab


def run(*command: str, text: str = "") -> None:
    subprocess.run(command, input=text, text=True, check=True)


@pytest.mark.net
def test_the_kernel_tells_of_tables_and_rules_that_go_and_not_of_those_that_come(
    relay: Lab,
) -> None:
    with closing(RuleWatcher()) as watcher:
        run("nft", "-f", "-", text=MINE)
        assert select.select([watcher], [], [], 5)[0]
        assert watcher.drain() == frozenset()
        run("nft", "flush", "chain", "ip", "mine", "c")
        assert watcher.drain() == frozenset({"mine"})
        run("iptables", "-t", "raw", "-A", "PREROUTING", "-j", "ACCEPT")
        run("iptables", "-t", "raw", "-F")
        assert watcher.drain() == frozenset({"raw"})
        run("nft", "flush", "ruleset")
        assert watcher.drain() == frozenset({"mine", "raw"})
        assert watcher.drain() == frozenset()


def backends() -> list[Backend]:
    """Every way that this kernel has; found in the lab."""
    works = []
    for backend in netfilter.CANDIDATES:
        try:
            backend.install(SPEC)
            backend.remove(SPEC.name)
        except RulesUnavailable:
            continue
        works.append(backend)
    return works


@pytest.mark.net
def test_rules_are_intact_until_any_of_them_goes(relay: Lab) -> None:
    found = backends()
    assert found
    for backend in found:
        assert not backend.intact(SPEC)
        backend.install(SPEC)
        assert backend.intact(SPEC)
        tables = backend.tables(SPEC.name)
        legacy = isinstance(backend, Iptables) and backend.is_legacy
        assert bool(tables) is not legacy
        breaks: list[tuple[str, ...]]
        if isinstance(backend, Iptables):
            pre = f"{SPEC.name}-pre"
            breaks = [
                (backend.name, "-t", "raw", "-D", "PREROUTING", "-j", pre),
                (backend.name, "-t", "raw", "-D", pre, "1"),
                (backend.name, "-t", "raw", "-F"),
                (backend.name, "-t", "mangle", "-F"),
            ]
        else:
            breaks = [
                ("nft", "flush", "chain", "ip", SPEC.name, "post"),
                ("nft", "delete", "table", "ip", SPEC.name),
            ]
        for command in breaks:
            run(*command)
            assert not backend.intact(SPEC), command
            backend.install(SPEC)
            assert backend.intact(SPEC)
        backend.remove(SPEC.name)
        assert not backend.intact(SPEC)


def test_nft_counts_its_rules_in_what_nft_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel of a test machine may have no `queue` for nft."""
    from krelay.rules import ruleset

    entries = [{"metainfo": {}}, {"table": {"name": SPEC.name}}] + [
        {"rule": {"chain": chain}}
        for chain, rules in ruleset.nft_rules(SPEC).items()
        for _ in rules
    ]
    listed = entries
    monkeypatch.setattr(kernel, "has_chain", lambda table, chain: True)
    monkeypatch.setattr(netfilter, "run", lambda command, text="": json.dumps({"nftables": listed}))

    assert netfilter.Nft().intact(SPEC)
    listed = entries[:-1]
    assert not netfilter.Nft().intact(SPEC)
