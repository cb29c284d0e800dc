"""Our packets as the rules of the host see them: what is told, and what lets them by."""

from dataclasses import replace
from typing import Any

import pytest

from krelay.doctor import iptrules
from krelay.doctor.facts import Facts, LinkFacts
from krelay.doctor.findings import Finding, Level
from krelay.doctor.firewall import NEVER, Chain, Match, Rule, RuleVerdict
from krelay.doctor.rulecheck import check
from procfs_sim.tree import Config, Service, parse
from tests.krelay.doctor.test_checks import HEALTHY, TCP_ONLY

MANY = tuple(Service("udp", port, port) for port in range(1001, 1021, 2))
RANGES = (*MANY, *(Service("udp", low, low + 5) for low in (2000, 3000, 4000)))


def base(hook: str, *rules: Rule, policy: str = "accept", **changes: Any) -> Chain:
    """A base chain of nft."""
    chain = Chain("nft", "inet", "guard", "c", rules, hook, policy=policy)
    return replace(chain, **changes)


def rule(kind: str, *matches: Match) -> Rule:
    """A rule without much text."""
    return Rule(kind, matches, RuleVerdict(kind))


def wrong(*chains: Chain, **changes: Any) -> list[Finding]:
    """The findings that aren't ok."""
    facts: Facts = replace(HEALTHY, chains=chains, **changes)
    return [finding for finding in check(facts) if finding.level is not Level.OK]


def iptables(*rules: str, tool: str = "iptables") -> tuple[Chain, ...]:
    """A filter table that drops, with more rules."""
    head = ["*filter", ":INPUT DROP [0:0]", ":FORWARD DROP [0:0]", ":OUTPUT ACCEPT [0:0]"]
    return iptrules.chains("\n".join([*head, *rules]), tool)


SERVER = "192.168.0.10"
OWN = (
    "tcp sport '{ 80, 443, 53, 16000 }' accept",
    "icmp type destination-unreachable accept",
)
"""The fixes of what krelay itself sends."""


@pytest.mark.parametrize(
    ("chain", "fixes"),
    [
        (base("input", policy="drop"), [
            "tcp dport 16000 accept",
            f"ip saddr {SERVER} tcp sport '{{ 53, 80, 443 }}' ct state established accept"]),
        (base("output", policy="drop"), [
            "tcp sport 16000 ct state established accept",
            f"ip daddr {SERVER} tcp dport '{{ 53, 80, 443 }}' accept",
            *OWN]),
        (base("forward", policy="drop"), [
            f"ip daddr {SERVER} udp dport 53 accept",
            f"ip saddr {SERVER} udp sport 53 ct state established accept"]),
        (base("prerouting", policy="drop", priority=-310), [
            "tcp dport '{ 53, 80, 443 }' accept",
            f"ip saddr {SERVER} tcp sport '{{ 53, 80, 443 }}' accept",
            "udp dport 53 accept",
            f"ip saddr {SERVER} udp sport 53 accept"]),
    ],
    ids=lambda value: value.hook if isinstance(value, Chain) else "",
)  # fmt: skip
def test_a_chain_that_drops_everything_gets_a_rule_for_each_kind_of_ours(
    chain: Chain, fixes: list[str]
) -> None:
    findings = wrong(chain)

    told = {f.fix.removeprefix("nft insert rule inet guard c "): f.level for f in findings}
    found = set(told)
    normal = {fix.replace("{ 80, 443, 53 }", "{ 53, 80, 443 }") for fix in found}
    assert normal == set(fixes)
    warnings = {fix for fix, level in told.items() if level is Level.WARNING}
    assert len(warnings) == (len(OWN) if chain.hook == "output" else 0)
    assert set(told.values()) <= {Level.FAILED, Level.WARNING}


@pytest.mark.parametrize(
    ("rules", "services", "wanted"),
    [
        # established alone: refusals are of no connection that tracking knows
        ([rule("accept", Match("state", ("established", "related")))], "tcp/80 udp/53",
         {"tcp sport '{ 80, 16000 }' accept", OWN[-1]}),
        # what is invalid is dropped, all else let by; a SYN to a killed client is new
        ([rule("drop", Match("state", ("invalid",))), rule("accept")], "tcp/443=forward",
         {"tcp sport 443 accept"}),
        # only what is new is stopped: resets of none get by, but not the SYN before them
        ([rule("drop", Match("state", ("new",))), rule("accept")], "tcp/443=forward",
         {"tcp sport 443 accept"}),
        ([rule("accept", Match("flags", (frozenset({"rst"}), frozenset({"rst"})))),
          rule("accept", Match("proto", ("icmp",)), Match("icmp", (3,)))], "tcp/80 udp/53", set()),
        ([rule("accept", Match("proto", ("icmp",)), Match("icmp", (8,)))], "udp/53", {OWN[-1]}),
        ([rule("accept", Match("src_type", ("local",)))], "tcp/80 tcp/443=forward udp/53",
         {f"ip daddr {SERVER} tcp dport 443 accept"}),
        ([rule("accept")], "tcp/80 tcp/443=forward udp/53", set()),
    ],
)  # fmt: skip
def test_what_krelay_itself_sends_is_looked_for_in_what_leaves(
    rules: list[Rule], services: str, wanted: set[str]
) -> None:
    found = wrong(
        base("output", *rules, policy="drop"),
        config=Config(services=parse("services", services)),
    )
    own = [f for f in found if "krelay itself sends" in f.text]
    assert {f.fix.removeprefix("nft insert rule inet guard c ") for f in own} == wanted
    assert {f.level for f in own} <= {Level.WARNING}


def test_refusals_in_silence_send_no_errors() -> None:
    quiet = Config(services=(Service("udp", 53, 53),), limits_refusal="drop")

    assert wrong(base("output", policy="drop"), config=quiet) == []


def test_own_packets_are_let_by_in_iptables() -> None:
    text = "*filter\n:OUTPUT DROP [0:0]\n-A OUTPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT\n"
    both = Config(services=(Service("tcp", 443, 443, False, True), Service("udp", 53, 53)))
    fixes = {f.fix for f in wrong(*iptrules.chains(text, "iptables"), config=both)}

    assert fixes == {
        "iptables -w -I OUTPUT -p tcp --sport 443 -j ACCEPT",
        "iptables -w -I OUTPUT -p icmp --icmp-type destination-unreachable -j ACCEPT",
    }
    rules = (
        "-A OUTPUT -p icmp -m icmp --icmp-type 3 -j ACCEPT\n-A OUTPUT -p tcp --sport 443 -j ACCEPT"
    )
    assert wrong(*iptrules.chains(f"{text}{rules}\n", "iptables"), config=both) == []


def test_what_is_not_relayed_is_not_asked_for() -> None:
    udp = Config(services=(Service("udp", 53, 53),))
    tcp = Config(services=(Service("tcp", 80, 80),))

    assert wrong(base("input", policy="drop"), config=udp) == []
    assert wrong(base("forward", policy="drop"), config=tcp) == []
    assert wrong(base("input", rule("drop", NEVER))) == []


def test_tcp_that_is_forwarded_passes_where_udp_does() -> None:
    through = Config(services=(Service("tcp", 443, 443, False, True),))

    assert wrong(base("input", policy="drop"), config=through) == []
    found = wrong(base("forward", policy="drop"), config=through)
    assert {f.fix.removeprefix("nft insert rule inet guard c ") for f in found} == {
        f"ip daddr {SERVER} tcp dport 443 accept",
        f"ip saddr {SERVER} tcp sport 443 ct state established accept",
    }


def test_untracked_answers_are_let_by_without_their_state() -> None:
    notrack = base("prerouting", rule("notrack"), priority=-300, name="early")
    fixes = {f.fix for f in wrong(notrack, base("forward", policy="drop"))}

    assert f"nft insert rule inet guard c ip saddr {SERVER} udp sport 53 accept" in fixes


def test_an_answer_to_what_is_untracked_is_new() -> None:
    asked = rule("notrack", Match("proto", ("udp",)), Match("dport", ((53, 53),)))
    notrack = base("prerouting", asked, priority=-250, name="early")
    established = rule("accept", Match("state", ("established",)))
    to_server = rule("accept", Match("dport", ((53, 53),)))
    forward = base("forward", established, to_server, policy="drop")
    udp = Config(services=(Service("udp", 53, 53),))

    assert wrong(forward, config=udp) == []
    (told,) = wrong(notrack, forward, config=udp)
    assert told.level is Level.FAILED
    assert "(U3, forward)" in told.text
    assert told.fix == f"nft insert rule inet guard c ip saddr {SERVER} udp sport 53 accept"


def test_rules_of_iptables_that_ours_precede_do_not_count() -> None:
    raw = iptrules.chains(
        "*raw\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -p udp -j DROP\n", "iptables"
    )

    assert wrong(*raw, backend="iptables") == []
    assert {f.level for f in wrong(*raw, backend="nft")} == {Level.FAILED}


def test_source_nat_is_a_warning_where_it_hides_the_client() -> None:
    masquerade = base("postrouting", rule("snat"), kind="nat", priority=100)
    (told,) = wrong(masquerade)

    assert told.level is Level.WARNING
    assert "won't see the client" in told.text
    assert told.fix == f"nft insert rule inet guard c ip daddr {SERVER} udp dport 53 accept"
    assert wrong(masquerade, config=Config(source="relay")) == []
    assert wrong(masquerade, beside=True) == []


def test_all_that_ends_a_way_is_told_in_one_look() -> None:
    """What lies behind it would be met as soon as the first is fixed."""
    chains = (
        base("forward", policy="drop"),
        base("forward", rule("drop"), name="second", priority=10),
        base("postrouting", policy="drop", name="d"),
    )
    told = [f for f in wrong(*chains) if "(U1, " in f.text]

    assert {f.text.rpartition("chain ")[2] for f in told} == {
        *("inet guard c (U1, forward)", "inet guard second (U1, forward)"),
        "inet guard d (U1, postrouting)",
    }
    assert {f.level for f in told} == {Level.FAILED}
    assert len({f.fix for f in told}) == 3


def test_each_chain_that_drops_is_told_once_with_its_first_reason() -> None:
    both = base("forward", rule("drop"), rule("drop"), policy="drop")
    told = [f for f in wrong(both) if "(U1, " in f.text]

    assert [f.text for f in told] == [f.text for f in told if "`" in f.text]
    assert len(told) == 1


def test_chains_at_all_hooks_of_tcp_are_told_in_one_look() -> None:
    chains = [
        base(hook, policy="drop", name=name, priority=priority)
        for hook, name, priority in (
            *(("prerouting", "early", -310), ("prerouting", "late", -150)),
            *(("input", "one", 0), ("input", "two", 10), ("input", "three", 20)),
            *(("output", "out", 0), ("postrouting", "post", 100)),
        )
    ]
    told = {f.text.rpartition("inet guard ")[2] for f in wrong(*chains, config=TCP_ONLY)}

    assert {text for text in told if "(T1, " in text} == {
        *("early (T1, prerouting)", "late (T1, prerouting)"),
        *("one (T1, input)", "two (T1, input)", "three (T1, input)"),
    }
    assert {text for text in told if "(T3, " in text} == {
        *("out (T3, output)", "post (T3, postrouting)"),
    }


@pytest.mark.parametrize(
    ("links", "accepts", "certain"),
    [
        (("eth0", "eth1", "eth2"), "lo", True),
        (("eth1",), "lo", True),
        (("eth0", "eth1", "eth2"), "wg0", True),
        (("eth0", "eth1", "eth2"), "eth2", False),
    ],
)
def test_a_default_drop_is_certain_where_clients_come_by_any_link_but_the_loopback(
    links: tuple[str, ...], accepts: str, certain: bool
) -> None:
    loopback = Rule("accept", (Match("iif", (accepts,)),), RuleVerdict("accept"))
    told = [
        f
        for f in wrong(
            base("input", loopback, policy="drop"),
            config=TCP_ONLY,
            links=tuple(map(LinkFacts, links)),
            client=None,
        )
        if "(T1, " in f.text
    ]

    assert [f.level is Level.FAILED for f in told] == [certain]
    assert ("may be dropped" in told[0].text) is not certain


@pytest.mark.parametrize(
    ("rules", "tools", "fixes"),
    [
        ((), (), [
            "iptables -w -I INPUT -p tcp --dport 16000 -j ACCEPT",
            f"iptables -w -I FORWARD -d {SERVER} -p udp --dport 53 -j ACCEPT",
            f"iptables -w -I FORWARD -s {SERVER} -p udp --sport 53 "
            "-m conntrack --ctstate ESTABLISHED -j ACCEPT"]),
        ((":DOCKER-USER - [0:0]", "-A FORWARD -j DOCKER-USER"), (), [
            f"iptables -w -I DOCKER-USER -d {SERVER} -p udp --dport 53 -j ACCEPT"]),
        ((":ufw-user-input - [0:0]",), ("ufw",), [
            "ufw allow proto tcp to any port 16000",
            f"ufw route allow proto udp to {SERVER} port 53"]),
        ((":ufw-user-input - [0:0]",), (), [
            "iptables -w -I INPUT -p tcp --dport 16000 -j ACCEPT"]),
    ],
    ids=["plain", "docker", "ufw", "ufw without its tool"],
)  # fmt: skip
def test_mends_of_iptables_docker_and_ufw(
    rules: tuple[str, ...], tools: tuple[str, ...], fixes: list[str]
) -> None:
    found = {f.fix for f in wrong(*iptables(*rules), tools=frozenset(tools))}

    assert [fix for fix in fixes if fix not in found] == []


@pytest.mark.parametrize(
    ("refusal", "fixes"),
    [
        ("-A ufw-user-input -p tcp --dport 16000 -j DROP", [
            "ufw allow proto tcp to any port 16000 && ufw delete allow proto tcp to any port 16000 "
            "&& ufw prepend allow proto tcp to any port 16000"]),
        ("-A ufw-user-forward -j REJECT", [
            f"ufw route allow proto udp to {SERVER} port 53 && "
            f"ufw route delete allow proto udp to {SERVER} port 53 && "
            f"ufw route prepend allow proto udp to {SERVER} port 53"]),
        ("-A ufw-after-input -j DROP", ["ufw allow proto tcp to any port 16000"]),
        ("-A ufw-before-input -p tcp --dport 16000 -j DROP", [
            "iptables -w -I INPUT -p tcp --dport 16000 -j ACCEPT"]),
        ("-A INPUT -p tcp --dport 16000 -j DROP", [
            "iptables -w -I INPUT -p tcp --dport 16000 -j ACCEPT"]),
        ("-P OUTPUT DROP", [f"ufw allow out proto tcp to {SERVER} port 80,443,53"]),
    ],
)  # fmt: skip
def test_what_ufw_is_told_is_ahead_of_what_its_users_refuse(refusal: str, fixes: list[str]) -> None:
    chains = [
        f"{builtin} -j ufw-{part}-{builtin.lower()}"
        for builtin in ("INPUT", "FORWARD", "OUTPUT")
        for part in ("before", "user", "after")
    ]
    names = [f":{chain.split()[-1]} - [0:0]" for chain in chains]
    jumps = [f"-A {chain}" for chain in chains]
    if refusal.startswith("-P"):
        rules = [*names, ":OUTPUT DROP [0:0]", *jumps]
    else:
        rules = [*names, refusal, *jumps]
    found = [f.fix for f in wrong(*iptables(*rules), tools=frozenset({"ufw"}))]

    assert [fix for fix in fixes if fix not in found] == [], found


FIREWALLD_IN = "firewall-cmd --permanent --policy=krelay-in "


@pytest.mark.parametrize(
    ("chain", "fix"),
    [
        ("filter_INPUT", "--permanent --add-port=16000/tcp && firewall-cmd --reload"),
        ("filter_IN_public", "--permanent --zone=public --add-port=16000/tcp && "),
        ("filter_IN_public_allow", "--permanent --zone=public --add-port=16000/tcp && "),
        ("filter_IN_my_zone_post", "--permanent --zone=my_zone --add-port=16000/tcp && "),
        ("filter_IN_my_zone_deny", f"{FIREWALLD_IN}--add-egress-zone=HOST; "),
        ("filter_IN_public_pre", f"{FIREWALLD_IN}--set-priority=-32768; "),
        ("filter_IN_policy_none", f"{FIREWALLD_IN}--add-rich-rule='rule family=ipv4 "
            "port port=16000 protocol=tcp accept' && firewall-cmd --reload"),
    ],
)  # fmt: skip
def test_mends_of_firewalld_name_the_zone_where_its_ports_are_looked_at(
    chain: str, fix: str
) -> None:
    jump = [] if chain == "filter_INPUT" else [Rule("", (), RuleVerdict("jump", chain))]
    chains = [
        base("input", *jump, policy="drop", name="filter_INPUT", table="firewalld"),
        base("", rule("drop"), name=chain, table="firewalld"),
    ][: 1 + len(jump)]
    (found, *_) = (f.fix for f in wrong(*chains, tools=frozenset({"firewall-cmd"})))

    assert fix in found
    plain = {f.fix for f in wrong(*chains)}
    assert "nft insert rule inet firewalld filter_INPUT tcp dport 16000 accept" in plain


def test_what_firewalld_doesnt_forward_a_policy_lets_by() -> None:
    chain = base("forward", rule("drop"), table="firewalld", name="filter_FORWARD")
    found = {f.fix for f in wrong(chain, tools=frozenset({"firewall-cmd"}))}
    (policy,) = (fix for fix in found if "--new-policy=krelay;" in fix)

    assert f"destination address={SERVER} port port=53 protocol=udp accept'" in policy
    assert "--policy=krelay --add-egress-zone=ANY;" in policy
    (answers,) = found - {policy}
    assert "ct state established accept" in answers


def test_many_ports_are_as_many_rules_of_ufw_as_it_takes() -> None:
    config = Config(services=RANGES)
    rules = iptables(":ufw-user-input - [0:0]")
    (fix,) = (
        f.fix
        for f in wrong(*rules, config=config, tools=frozenset({"ufw"}))
        if f.fix.startswith("ufw route ")
    )
    ports = [command.split(" port ")[1].split(",") for command in fix.split(" && ")]

    assert [sum(2 if ":" in port else 1 for port in group) for group in ports] == [14, 2]


def test_many_ports_are_as_many_rules_of_iptables_as_multiport_needs() -> None:
    config = Config(services=RANGES)
    (fix,) = (f.fix for f in wrong(*iptables(), config=config) if "-d " in f.fix)
    commands = fix.split(" && ")

    assert len(commands) == 2
    for command in commands:
        ports = command.partition("--dports ")[2].split()[0].split(",")
        assert sum(2 if ":" in port else 1 for port in ports) <= 15


def test_no_rules_and_rules_that_let_by_are_ok() -> None:
    assert [f.text for f in check(HEALTHY)] == ["no rules but krelay's"]
    (told,) = check(replace(HEALTHY, chains=(base("forward", rule("accept")),)))
    assert told.text == "the host's rules let by what is relayed (chains: 1)"


def test_a_flow_table_takes_what_is_forwarded_unless_a_rule_comes_before() -> None:
    both = Config(services=parse("services", "udp/53 tcp/443=forward tcp/80"))
    found = wrong(base("forward", rule("flow")), config=both)

    assert {f.level for f in found} == {Level.FAILED}
    assert all("handed to a flow table" in f.text for f in found)
    assert {f.fix.removeprefix("nft insert rule inet guard c ") for f in found} == {
        f"ip daddr {SERVER} udp dport 53 accept",
        f"ip saddr {SERVER} udp sport 53 ct state established accept",
        f"ip daddr {SERVER} tcp dport 443 accept",
        f"ip saddr {SERVER} tcp sport 443 ct state established accept",
    }
    assert wrong(base("forward", rule("accept"), rule("flow")), config=both) == []
