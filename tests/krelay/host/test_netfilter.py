"""Rules in a real kernel: in and out without a trace, and nobody else's touched."""

import errno
import os
import re
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network

import pytest

from knet.rules import kernel
from knet.rules.run import RulesAbsent, RulesDelayed, RulesUnavailable, run
from krelay.host import netfilter
from krelay.host.netfilter import (
    Backend,
    Iptables,
    Nft,
    probe,
    same_rules,
)
from krelay.rules import ruleset
from krelay.rules.spec import RuleSpec
from krelay_vm import Lab

SPEC = RuleSpec(
    name="krelay-test",
    queue=77,
    tcp=((80, 80), (8000, 8100)),
    udp=((53, 53),),
    gports=(16000, 17000),
    servers=(IPv4Address("192.168.0.1"), IPv4Address("192.168.0.3")),
    relay_clients=(IPv4Network("192.168.0.0/24"),),
)
FOREIGN = """*raw
-A PREROUTING -s 203.0.113.0/24 -j DROP
COMMIT
*filter
:docker-like - [0:0]
-A FORWARD -j docker-like
-A docker-like -p tcp --dport 22 -j ACCEPT
COMMIT
"""


@pytest.fixture
def relay() -> Iterator[Lab]:
    """A lab in whose relay host this thread is."""
    with Lab() as lab, lab.enter("relay"):
        yield lab


@pytest.fixture
def backend(relay: Lab, request: pytest.FixtureRequest) -> Backend:
    """Each that works here: the tests may name one."""
    return getattr(request, "param", None) or probe()


def rules() -> str:
    """Everything that nft knows of, but for what counts by itself."""
    done = subprocess.run(
        ["nft", "--stateless", "list", "ruleset"], capture_output=True, text=True, check=True
    )
    return done.stdout


def add(text: str) -> None:
    subprocess.run(["iptables-restore", "--noflush"], input=text, text=True, check=True)


@pytest.fixture
def silent_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel, or rights, that give no netlink: the tools are asked all things."""

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EPROTONOSUPPORT, os.strerror(errno.EPROTONOSUPPORT))

    monkeypatch.setattr(kernel, "NetlinkSocket", refused)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The command lines that are run from now on."""
    told: list[tuple[str, ...]] = []

    def noted(command: tuple[str, ...], text: str = "") -> str:
        told.append(command)
        return run(command, text)

    monkeypatch.setattr(netfilter, "run", noted)
    return told


BACKENDS = (Nft(with_xt=True), Iptables("iptables"))
EACH = pytest.mark.parametrize("backend", BACKENDS, indirect=True, ids=lambda b: b.name)


@pytest.mark.net
@EACH
@pytest.mark.parametrize("foreign", ["", FOREIGN])
def test_what_is_put_in_is_taken_out_without_a_trace(backend: Backend, foreign: str) -> None:
    if foreign:
        add(foreign)
    before = rules()
    backend.install(SPEC)
    assert backend.present(SPEC.name)
    assert rules() != before
    backend.remove(SPEC.name)

    assert rules() == before
    assert not backend.present(SPEC.name)
    backend.remove(SPEC.name)
    assert rules() == before


@pytest.mark.net
@EACH
def test_other_rules_of_that_name_are_replaced_and_never_doubled(backend: Backend) -> None:
    other = replace(SPEC, gports=(18000,), tcp=((443, 443),))
    backend.install(other)
    once = rules()
    backend.install(SPEC)
    backend.install(SPEC)
    assert rules().count("16000") == once.count("18000")
    backend.install(other)

    assert rules() == once


@pytest.mark.net
@EACH
def test_two_names_side_by_side_do_not_disturb_each_other(backend: Backend) -> None:
    backend.install(SPEC)
    alone = rules()
    backend.install(replace(SPEC, name="krelay-other", queue=78))
    backend.remove("krelay-other")

    assert rules() == alone


@pytest.mark.net
@pytest.mark.parametrize("table", ["raw", "mangle"])
def test_what_somebody_has_half_removed_is_removed_and_can_be_put_in_again(
    relay: Lab, table: str
) -> None:
    backend = Iptables("iptables")
    backend.install(SPEC)
    whole = rules()
    subprocess.run(["iptables", "-t", table, "-F"], check=True)
    backend.install(SPEC)
    assert rules() == whole
    subprocess.run(["iptables", "-t", table, "-F"], check=True)
    backend.remove(SPEC.name)

    assert rules() == ""


@pytest.mark.net
def test_looking_for_rules_makes_none(relay: Lab) -> None:
    """The older iptables would make its tables for being asked."""
    for backend in netfilter.CANDIDATES:
        assert not backend.present(SPEC.name)
        backend.remove(SPEC.name)

    assert rules() == ""
    legacy = subprocess.run(
        ["cat", "/proc/thread-self/net/ip_tables_names"], capture_output=True, text=True
    )
    assert legacy.stdout == ""


@pytest.mark.net
def test_when_the_second_table_is_refused_the_first_is_taken_back(
    relay: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    install = ruleset.iptables_install

    def broken(spec: RuleSpec, hung: frozenset[str]) -> str:
        return install(spec, hung).replace("-m socket", "-m nosuchmatch")

    monkeypatch.setattr(ruleset, "iptables_install", broken)
    with pytest.raises(RulesUnavailable, match="nosuchmatch"):
        Iptables("iptables").install(SPEC)

    assert rules() == ""


@pytest.mark.net
def test_iptables_without_comments_has_the_rules_without_labels(
    relay: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Iptables._restore

    def lacks_comments(self: Iptables, text: str) -> None:
        if "--comment" in text:
            raise RulesUnavailable("No chain/target/match by that name.")
        restore(self, text)

    backend = Iptables("iptables")
    backend.install(SPEC)
    labelled = subprocess.run(["iptables-save"], capture_output=True, text=True).stdout
    assert '--comment "ICMP error"' in labelled
    assert "--comment T3 " in labelled
    monkeypatch.setattr(Iptables, "_restore", lacks_comments)
    backend.install(SPEC)
    assert backend.intact(SPEC)
    assert "comment" not in subprocess.run(["iptables-save"], capture_output=True, text=True).stdout
    backend.remove(SPEC.name)
    assert rules() == ""


@pytest.mark.net
def test_all_of_the_nft_rules_but_for_the_queue_are_taken_by_the_kernel(relay: Lab) -> None:
    """Which queue there is is the only thing in which the two ways of nft differ."""
    for room in (0, 1000):
        text = ruleset.nft_install(replace(SPEC, room=room, forwarded=((443, 443),)))
        text = re.sub(r"queue num \d+", "counter", text)
        for _ in range(2):  # the second replaces the first
            subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)
            assert rules().count("table ip krelay-test") == 1
        assert Nft().present(SPEC.name)
    Nft().remove(SPEC.name)

    assert rules() == ""


@pytest.mark.net
def test_rules_are_changed_and_who_has_asked_stays(relay: Lab) -> None:
    backend = Nft(with_xt=True)
    spec = replace(SPEC, room=1000, any_port=((69, 69),), asked_within=300)
    backend.install(spec)
    element = "askers { 10.0.0.1 . 4000 timeout 300s }"
    subprocess.run(["nft", "add", "element", "ip", SPEC.name, *element.split()], check=True)
    other = replace(spec, gports=(18000,), servers=SPEC.servers[:1])
    backend.install(other, afresh=False)
    assert "10.0.0.1 . 4000" in rules()
    assert "18000" in rules()
    assert "17000" not in rules()
    assert backend.intact(other)
    backend.install(spec)
    assert "10.0.0.1" not in rules()

    backend.remove(SPEC.name)
    assert rules() == ""


@pytest.mark.net
def test_rules_change_while_the_hooks_stay(relay: Lab) -> None:
    """With the hooks would go what waits in the queues; by their handles they are the same."""
    backend = Nft(with_xt=True)
    specs = [replace(SPEC, room=room, gports=(room or 1,)) for room in (1000, 0, 2000)]
    fresh = []
    for spec in specs:
        backend.install(spec)
        fresh.append(rules())

    def hooks() -> list[str]:
        shown = subprocess.run(
            ["nft", "-a", "list", "table", "ip", SPEC.name], capture_output=True, text=True
        ).stdout
        return re.findall(r"chain (?:pre|post|to-worker|openings) \{ # handle \d+", shown)

    kept = hooks()
    for after in (0, 0, 1, 2):
        backend.install(specs[after], afresh=False)
        assert (rules(), hooks()) == (fresh[after], kept)
        assert backend.intact(specs[after])


@pytest.mark.net
@pytest.mark.parametrize("chain", ["pre", "post-udp", "to-worker", "openings"])
def test_a_chain_that_somebody_flushed_is_noticed(relay: Lab, chain: str) -> None:
    backend = Nft(with_xt=True)
    backend.install(SPEC)
    assert backend.intact(SPEC)
    subprocess.run(["nft", "flush", "chain", "ip", SPEC.name, chain], check=True)

    assert not backend.intact(SPEC)


@pytest.mark.net
def test_looking_for_a_way_changes_nothing_here(relay: Lab) -> None:
    probe()

    assert rules() == ""
    assert not probe().present("krelay-probe")


@pytest.mark.net
def test_where_no_namespace_can_be_had_nothing_stays_either(
    relay: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    way = probe()
    monkeypatch.setattr(netfilter, "_leave_for_a_new_namespace", lambda: False)

    assert probe() == way
    assert rules() == ""


@pytest.mark.net
def test_a_start_and_a_stop_run_nft_twice_and_nothing_else(
    relay: Lab, runs: list[tuple[str, ...]]
) -> None:
    backend = probe()
    for each in netfilter.places(SPEC.name):
        assert not each.present(SPEC.name)
    backend.install(SPEC)
    assert backend.present(SPEC.name)
    backend.remove(SPEC.name)

    assert runs == [("nft", "-f", "-")] * 2
    assert rules() == ""


@pytest.mark.net
@EACH
def test_without_netlink_the_tools_tell_and_do_the_same(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    way, told = probe(), netfilter.places(SPEC.name)
    backend.install(SPEC)
    assert {each.name for each in netfilter.places(SPEC.name)} >= {each.name for each in told}
    request.getfixturevalue("silent_kernel")

    assert any(netfilter.same_rules(backend, each) for each in netfilter.places(SPEC.name))
    assert backend.present(SPEC.name)
    backend.remove(SPEC.name)
    assert rules() == ""
    assert not backend.present(SPEC.name)
    monkeypatch.undo()
    assert probe() == way


@pytest.mark.net
@pytest.mark.parametrize("tool", ["iptables-nft", "iptables-legacy"])
def test_iptables_is_asked_where_it_may_have_rules_of_that_name(
    relay: Lab, runs: list[tuple[str, ...]], tool: str
) -> None:
    assert [each.name for each in netfilter.places(SPEC.name)] == ["nft"]
    assert runs == []
    Iptables(tool).install(SPEC)
    runs.clear()

    there = [each for each in netfilter.places(SPEC.name) if each.present(SPEC.name)]
    assert len(there) == 1
    assert same_rules(there[0], Iptables(tool))
    there[0].remove(SPEC.name)
    assert not Iptables(tool).present(SPEC.name)
    assert runs


@pytest.mark.net
def test_rules_of_nft_go_also_where_nft_does(relay: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = Nft(with_xt=True)
    backend.install(SPEC)
    with monkeypatch.context() as without:
        without.setenv("PATH", "")
        assert backend.present(SPEC.name)
        backend.remove(SPEC.name)
        assert not backend.present(SPEC.name)

    assert rules() == ""


def test_what_was_tried_is_told_where_nothing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RulesUnavailable) as told:
        probe()

    assert "neither nft's queue nor the NFQUEUE target of iptables works" in str(told.value)
    for backend in netfilter.CANDIDATES:
        assert f"{backend.name}: " in str(told.value)
    assert "nft is not installed" in str(told.value)


@pytest.mark.parametrize(
    ("versions", "same"),
    [
        (("iptables v1.8.9 (nf_tables)", "iptables v1.8.9 (nf_tables)"), True),
        (("iptables v1.8.7 (legacy)", "iptables v1.8.7 (nf_tables)"), False),
    ],
)
def test_iptables_is_another_name_of_one_of_the_two(
    monkeypatch: pytest.MonkeyPatch, versions: tuple[str, str], same: bool
) -> None:
    one, other = Iptables("iptables"), Iptables("iptables-nft")
    told = dict(zip(("iptables", "iptables-nft"), versions, strict=True))
    monkeypatch.setattr(netfilter, "_version", told.__getitem__)

    assert same_rules(one, other) is same
    assert not same_rules(one, Nft())


# What this host has no room for at the moment


def said(complaint: str, status: int = 1) -> subprocess.CompletedProcess[str]:
    """What a tool's run comes to."""
    return subprocess.CompletedProcess(("nft",), status, "", complaint)


@pytest.mark.parametrize(
    "number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EIO, errno.EPERM]
)
def test_a_tool_that_cannot_be_started_now_is_worth_another_try(
    silent_kernel: None, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(subprocess, "run", fails)
    for attempt in (
        lambda: Nft().install(SPEC),
        lambda: Nft().remove("krelay-test"),
        lambda: Nft().present("krelay-test"),
        lambda: Nft().intact(SPEC),
        probe,
    ):
        with pytest.raises(RulesDelayed, match=re.escape(os.strerror(number))):
            attempt()


@pytest.mark.parametrize(
    ("done", "kind"),
    [
        (said("netlink: Error: cache initialization failed: Too many open files"), RulesDelayed),
        (said("Could not process rule: No buffer space available"), RulesDelayed),
        (said("Could not process rule: Cannot allocate memory"), RulesDelayed),
        (said("", -9), RulesDelayed),  # somebody killed it
        (said("Another app is currently holding the xtables lock.", 4), RulesDelayed),
        (said("No chain/target/match by that name.", 4), RulesUnavailable),
        (said("Could not process rule: Operation not supported"), RulesAbsent),
        (said("Could not process rule: No such file or directory"), RulesAbsent),
        (said("Operation not permitted (you must be root)"), RulesUnavailable),
    ],
)
def test_a_tools_complaint_tells_whether_another_try_may_go_well(
    monkeypatch: pytest.MonkeyPatch,
    done: subprocess.CompletedProcess[str],
    kind: type[RulesUnavailable],
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    with pytest.raises(RulesUnavailable) as caught:
        Nft().install(SPEC)
    assert type(caught.value) is kind


@pytest.mark.parametrize("missing", [FileNotFoundError, PermissionError])
def test_a_tool_that_is_not_there_is_not_waited_for(
    silent_kernel: None, monkeypatch: pytest.MonkeyPatch, missing: type[OSError]
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise missing(errno.EACCES, "no")

    monkeypatch.setattr(subprocess, "run", fails)
    assert not Nft().present(SPEC.name)
    with pytest.raises(RulesUnavailable) as caught:
        Nft().install(SPEC)
    assert type(caught.value) is RulesAbsent


def test_rules_that_may_be_there_are_not_taken_for_removed(
    silent_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without privilege, or when nft takes too long, nobody can tell."""

    def takes_long(*_: object, **__: object) -> None:
        raise subprocess.TimeoutExpired("nft", 10)

    denied = said("netlink: Error: cache initialization failed: Operation not permitted")
    for result in (lambda *_, **__: denied, takes_long):
        monkeypatch.setattr(subprocess, "run", result)
        for attempt in (Nft().present, Nft().remove, lambda _: Nft().intact(SPEC)):
            with pytest.raises(RulesUnavailable):
                attempt(SPEC.name)
    absent = said("Error: No such file or directory")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: absent)
    assert not Nft().present(SPEC.name)
    Nft().remove(SPEC.name)


def test_a_worse_way_is_not_taken_because_the_best_has_no_room_now(
    silent_kernel: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tried: list[Backend] = []

    def install(backend: Backend, *_: object, **__: object) -> None:
        tried.append(backend)
        raise RulesDelayed("nft: Too many open files")

    for kind in (Nft, Iptables):
        monkeypatch.setattr(kind, "install", install)
    with pytest.raises(RulesDelayed):
        probe()
    assert tried == [netfilter.CANDIDATES[0]]


def test_each_place_of_rules_is_looked_at_once(
    silent_kernel: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {
        "iptables": "iptables v1.8.9 (legacy)",
        "iptables-nft": "iptables v1.8.9 (nf_tables)",
        "iptables-legacy": "iptables v1.8.9 (legacy)",
    }
    monkeypatch.setattr(netfilter, "_version", told.__getitem__)

    assert [backend.name for backend in netfilter.places(SPEC.name)] == [
        "nft",
        "iptables",
        "iptables-nft",
    ]


def test_a_place_whose_tool_does_not_say_what_it_is_is_looked_at(
    silent_kernel: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(command: str) -> str:
        raise RulesAbsent(f"{command} is not installed")

    monkeypatch.setattr(netfilter, "_version", absent)

    assert [backend.name for backend in netfilter.places(SPEC.name)] == [
        *("nft", "iptables", "iptables-nft", "iptables-legacy")
    ]
