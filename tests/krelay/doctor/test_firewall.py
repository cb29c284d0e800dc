"""Following a packet through rules: what nft and iptables say is read alike."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krelay.doctor import iptrules, nftrules
from krelay.doctor.firewall import Chain, Chains, Match, Packet, Rule, RuleVerdict, judge

CLIENT, RELAY, SERVER = 0x0A000001, 0x0A0000FE, 0xC0A80001
INTO = Packet("tcp", CLIENT, None, RELAY, 16000, "eth0", "", dst_local=True)
THROUGH = Packet("udp", CLIENT, None, SERVER, 53, "eth0", "eth1")
BACK = Packet("udp", SERVER, 53, CLIENT, None, "eth1", "eth0", reply=True)
STRANGER = INTO._replace(src=None)


def fates(chains: Chains, packet: Packet, hook: str = "input") -> list[tuple[str, bool]]:
    """Kind and certainty of each fate."""
    return [(fate.kind, fate.certain) for fate in judge(chains, hook, packet)[0]]


DROPPED, MAYBE, PASSES = [("drop", True)], [("drop", False)], list[tuple[str, bool]]()


def iptables(*rules: str, policy: str = "DROP", more: str = "") -> Chains:
    """A filter table with these rules in INPUT."""
    lines = ["*filter", f":INPUT {policy} [0:0]", ":FORWARD ACCEPT [0:0]", ":OUTPUT ACCEPT [0:0]"]
    lines += [more] if more else []
    return iptrules.chains("\n".join([*lines, *(f"-A INPUT {r}" for r in rules)]), "iptables")


@pytest.mark.parametrize(
    ("rule", "packet", "expected"),
    [
        ("-j ACCEPT", INTO, PASSES),
        ("-p tcp -m tcp --dport 16000 -j ACCEPT", INTO, PASSES),
        ("-p udp -m udp --dport 16000 -j ACCEPT", INTO, DROPPED),
        ("-p tcp -m tcp --dport 80 -j ACCEPT", INTO, DROPPED),
        ("-p tcp -m tcp --dport 15000:17000 -j ACCEPT", INTO, PASSES),
        ("-p tcp -m tcp ! --dport 80 -j ACCEPT", INTO, PASSES),
        ("-p tcp -m multiport --dports 80,16000:16001 -j ACCEPT", INTO, PASSES),
        ("-p tcp -m multiport --ports 16000 -j ACCEPT", INTO, PASSES),
        ("-p tcp -m tcp --sport 1024:65535 --dport 16000 -j ACCEPT", INTO, PASSES),
        ("-p tcp -m tcp --sport 40000:65535 -j ACCEPT", INTO, MAYBE),
        ("-s 10.0.0.0/8 -j ACCEPT", INTO, PASSES),
        ("-s 10.0.0.0/8 -j ACCEPT", STRANGER, MAYBE),
        ("! -s 10.0.0.0/8 -j ACCEPT", INTO, DROPPED),
        ("-m iprange --src-range 10.0.0.0-10.0.0.9 -j ACCEPT", INTO, PASSES),
        ("-i eth0 -j ACCEPT", INTO, PASSES),
        ("-i eth+ -j ACCEPT", INTO, PASSES),
        ("! -i eth0 -j ACCEPT", INTO, DROPPED),
        ("-i eth0 -j ACCEPT", INTO._replace(iif=None), MAYBE),
        ("-o eth0 -j ACCEPT", INTO, DROPPED),
        ("-m conntrack --ctstate NEW -j ACCEPT", INTO, PASSES),
        ("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", INTO, DROPPED),
        ("-m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", INTO._replace(reply=True), PASSES),
        ("-m conntrack --ctstate UNTRACKED -j ACCEPT", INTO._replace(tracked=False), PASSES),
        ("-m state --state NEW -j ACCEPT", INTO._replace(tracked=False), DROPPED),
        ("-m state --state NEW -j ACCEPT", INTO._replace(tracked=None), MAYBE),
        ("-m conntrack --ctstate DNAT -j ACCEPT", INTO, DROPPED),
        ("-m addrtype --dst-type LOCAL -j ACCEPT", INTO, PASSES),
        ("-m addrtype --src-type LOCAL -j ACCEPT", INTO, DROPPED),
        ("-m limit --limit 5/sec -j ACCEPT", INTO, MAYBE),
        ("-m owner --uid-owner 7 -j ACCEPT", INTO, MAYBE),
        ('-m comment --comment "no -j DROP" -j ACCEPT', INTO, PASSES),
        ("-p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT", INTO, PASSES),
        ("-p tcp -m tcp ! --tcp-flags FIN,SYN,RST,ACK SYN -j ACCEPT", INTO, DROPPED),
        ("-m mark --mark 0x1/0x1 -j ACCEPT", INTO, DROPPED),
        ("-p icmp -m icmp --icmp-type 8 -j ACCEPT", INTO, DROPPED),
        ("-f -j ACCEPT", INTO, DROPPED),
        ("-p all -j ACCEPT", INTO, PASSES),
        ("-j REJECT --reject-with icmp-port-unreachable", INTO, DROPPED),
        ('-j LOG --log-prefix "-j ACCEPT"', INTO, DROPPED),
        ("-j NFQUEUE --queue-num 3", INTO, [("queue", True)]),
        ("-s 'unclosed", INTO, DROPPED),
    ],
)
def test_a_rule_of_iptables_before_a_policy_that_drops(
    rule: str, packet: Packet, expected: list[tuple[str, bool]]
) -> None:
    assert fates(iptables(rule), packet) == expected


def nft(*rules: list[dict[str, Any]], policy: str = "drop", sets: dict[str, Any] | None = None,
        hook: str = "input", priority: int = 0, kind: str = "filter") -> Chains:  # fmt: skip
    """A table of nft with these rules in one base chain."""
    table = {"family": "inet", "table": "guard"}
    entries: list[dict[str, Any]] = [
        {"metainfo": {}},
        {"table": {"family": "inet", "name": "guard", "handle": 1}},
        *({"set": {**table, "name": name, "elem": elem}} for name, elem in (sets or {}).items()),
        {"chain": {**table, "name": "c", "type": kind, "hook": hook, "prio": priority,
                   "policy": policy}},
        {"chain": {**table, "name": "accepting"}},
        {"rule": {**table, "chain": "accepting", "handle": 99, "expr": [{"accept": None}]}},
        *({"rule": {**table, "chain": "c", "handle": 10 + n, "expr": expressions}}
          for n, expressions in enumerate(rules)),
    ]  # fmt: skip
    return nftrules.chains(json.loads(json.dumps({"nftables": entries})))


def match(left: Any, right: Any, op: str = "==") -> dict[str, Any]:
    """A match, as JSON has it."""
    return {"match": {"op": op, "left": left, "right": right}}


def field(proto: str, name: str) -> dict[str, Any]:
    """A field of a header."""
    return {"payload": {"protocol": proto, "field": name}}


def meta(key: str) -> dict[str, Any]:
    """What the kernel knows of a packet."""
    return {"meta": {"key": key}}


STATE = {"ct": {"key": "state"}}
ACCEPT: dict[str, Any] = {"accept": None}
NET = {"prefix": {"addr": "10.0.0.0", "len": 8}}
FLAGS = {"&": [field("tcp", "flags"), ["fin", "syn", "rst", "ack"]]}
ADDRESS_AND_PORT = {"concat": [field("ip", "saddr"), field("tcp", "dport")]}


@pytest.mark.parametrize(
    ("condition", "packet", "expected"),
    [
        ([], INTO, PASSES),
        ([match(field("tcp", "dport"), 16000)], INTO, PASSES),
        ([match(field("udp", "dport"), 16000)], INTO, DROPPED),
        ([match(field("th", "dport"), 16000)], INTO, PASSES),
        ([match(field("tcp", "dport"), {"set": [22, {"range": [15000, 17000]}]})], INTO, PASSES),
        ([match(field("tcp", "dport"), {"set": [22]}, "!=")], INTO, PASSES),
        ([match(field("tcp", "dport"), "@ports")], INTO, PASSES),
        ([match(field("tcp", "dport"), "@nowhere")], INTO, DROPPED),
        ([match(field("ip", "saddr"), NET)], INTO, PASSES),
        ([match(field("ip", "saddr"), NET)], STRANGER, MAYBE),
        ([match(field("ip", "saddr"), "@friends")], INTO, PASSES),
        ([match(field("ip6", "saddr"), "::1")], INTO, DROPPED),
        ([match(meta("nfproto"), "ipv4")], INTO, PASSES),
        ([match(meta("nfproto"), "ipv6")], INTO, DROPPED),
        ([match(meta("l4proto"), {"set": ["tcp", "udp"]})], INTO, PASSES),
        ([match(meta("iifname"), "eth*")], INTO, PASSES),
        ([match(meta("iif"), "lo")], INTO, DROPPED),
        ([match(meta("mark"), 1)], INTO, DROPPED),
        ([match({"&": [meta("mark"), 255]}, 1, "!=")], INTO, PASSES),
        ([match(meta("skuid"), 0)], INTO, MAYBE),
        ([match(STATE, ["established", "related"], "in")], INTO, DROPPED),
        ([match(STATE, {"set": ["established", "new"]})], INTO, PASSES),
        ([match({"ct": {"key": "status"}}, "dnat", "in")], INTO, DROPPED),
        ([match({"ct": {"key": "direction"}}, "original")], INTO, PASSES),
        ([match({"fib": {"result": "type", "flags": ["daddr"]}}, "local")], INTO, PASSES),
        ([match({"fib": {"result": "oif", "flags": ["saddr", "iif"]}}, False)], INTO, DROPPED),
        ([match(FLAGS, "syn")], INTO, PASSES),
        ([match(FLAGS, "syn")], INTO._replace(reply=True), DROPPED),
        ([match(field("tcp", "flags"), "syn", "in")], INTO, PASSES),
        ([match(ADDRESS_AND_PORT, {"set": [{"concat": ["10.0.0.1", 16000]}]})], INTO, PASSES),
        ([match(ADDRESS_AND_PORT, {"set": [{"concat": ["10.0.0.2", 16000]}]})], INTO, DROPPED),
        ([match(ADDRESS_AND_PORT, {"set": [{"concat": ["10.0.0.2", 1]}]}, "!=")], INTO, PASSES),
        ([{"limit": {"rate": 5, "per": "second"}}], INTO, MAYBE),
        ([match({"numgen": {"mode": "random", "mod": 100}}, 5, "<")], INTO, MAYBE),
        ([{"counter": {"packets": 0, "bytes": 0}}, {"log": None}], INTO, PASSES),
    ],
)
def test_a_rule_of_nft_before_a_policy_that_drops(
    condition: list[dict[str, Any]], packet: Packet, expected: list[tuple[str, bool]]
) -> None:
    sets = {
        "ports": [{"elem": {"val": 16000, "timeout": 5}}],
        "friends": [{"range": ["10.0.0.0", "10.0.0.9"]}],
    }

    assert fates(nft([*condition, ACCEPT], sets=sets), packet) == expected


def test_a_map_of_verdicts_is_a_rule_for_each_of_its_keys() -> None:
    by_state = {
        "vmap": {
            "key": STATE,
            "data": {"set": [["established", ACCEPT], ["new", {"jump": {"target": "accepting"}}]]},
        }
    }
    by_name = {"vmap": {"key": meta("iifname"), "data": "@links"}}
    links = {"links": [["eth0", {"goto": {"target": "accepting"}}], ["eth1", {"drop": None}]]}

    assert fates(nft([by_state]), INTO) == PASSES
    assert fates(nft([by_state]), INTO._replace(tracked=False)) == DROPPED
    assert fates(nft([by_name], sets=links), INTO) == PASSES
    assert fates(nft([by_name], sets=links, policy="accept"), INTO._replace(iif="eth1")) == DROPPED


def test_jump_comes_back_goto_does_not_and_return_leaves() -> None:
    more = ":a - [0:0]\n:b - [0:0]\n-A a -p udp -j ACCEPT\n-A b -j RETURN\n-A b -j ACCEPT"

    assert fates(iptables("-j a", "-j ACCEPT", more=more), INTO) == PASSES
    assert fates(iptables("-g a", "-j ACCEPT", more=more), INTO) == DROPPED
    assert fates(iptables("-j b", more=more), INTO) == DROPPED
    assert fates(iptables("-m limit --limit 1/s -g a", "-j ACCEPT", more=more), INTO) == MAYBE
    assert fates(iptables("-m limit --limit 1/s -j RETURN", "-j ACCEPT"), INTO) == MAYBE
    assert fates(iptables("-j nowhere", "-j ACCEPT"), INTO) == PASSES
    accepts = ":c - [0:0]\n-A c -j ACCEPT"
    assert fates(iptables("-m limit --limit 1/s -j RETURN", "-j c", more=accepts), INTO) == MAYBE


def test_who_is_not_named_is_not_among_those_that_a_rule_drops_by_address() -> None:
    listed, all_but = "-s 192.0.2.1/32 -j DROP", "! -s 10.0.0.0/8 -j DROP"

    assert fates(iptables(listed, policy="ACCEPT"), STRANGER) == PASSES
    assert fates(iptables(all_but, policy="ACCEPT"), STRANGER) == MAYBE
    assert fates(iptables("-s 10.0.0.1/32 -j DROP", policy="ACCEPT"), INTO) == DROPPED


def test_accept_ends_a_base_chain_and_the_next_still_has_its_say() -> None:
    first = nft([ACCEPT], priority=-10)
    second = iptables()

    assert fates((*second, *first), INTO) == DROPPED
    found, _ = judge((*second, *first), "input", INTO, upto=-1)
    assert found == []


def test_a_drop_ends_everything_and_names_the_rule() -> None:
    chains = (*iptables("-p tcp -j DROP", "-j ACCEPT"), *nft([{"drop": None}], priority=5))
    (fate,), _ = judge(chains, "input", INTO)

    assert fate.cause == "`-A INPUT -p tcp -j DROP` in iptables -t filter chain INPUT"
    assert fates(iptables(), INTO) == DROPPED
    (policy,), _ = judge(iptables(), "input", INTO)
    assert policy.cause == "the policy of iptables -t filter chain INPUT"


def test_as_if_mended_every_chain_that_drops_is_named() -> None:
    chains = (*iptables("-p tcp -j DROP"), *nft([{"drop": None}], priority=5))
    found, _ = judge(chains, "input", INTO, fixed=True)

    assert [fate.base.tool for fate in found] == ["iptables", "nft"]
    assert all(fate.certain for fate in found)


def test_translation_is_for_first_packets_and_a_new_source_ends_nothing() -> None:
    masquerade = nft([{"masquerade": None}], hook="postrouting", kind="nat", policy="accept",
                     priority=100)  # fmt: skip
    guard = nft([], hook="postrouting", priority=200)
    elsewhere = nft([{"redirect": {"port": 53}}], hook="prerouting", kind="nat", policy="accept")

    assert fates(masquerade, THROUGH, "postrouting") == [("snat", True)]
    assert fates((*masquerade, *guard), THROUGH, "postrouting") == [("snat", True), *DROPPED]
    assert fates(masquerade, BACK, "postrouting") == PASSES
    assert fates((*elsewhere, *guard), THROUGH, "prerouting") == [("nat", True)]


def test_marks_and_the_loss_of_tracking_are_carried_on() -> None:
    early = nft([{"notrack": None}], hook="prerouting", priority=-300, policy="accept")
    marks = nft([{"mangle": {"key": meta("mark"), "value": 1}}], hook="prerouting",
                priority=-150, policy="accept")  # fmt: skip
    drops = nft([match(meta("mark"), 1), {"drop": None}], hook="prerouting", policy="accept")
    found, after = judge((*early, *marks, *drops), "prerouting", THROUGH)

    assert after == THROUGH._replace(tracked=False, mark=None)
    assert [(fate.kind, fate.certain) for fate in found] == MAYBE
    assert fates(drops, THROUGH, "prerouting") == PASSES


def test_before_connection_tracking_everything_is_invalid() -> None:
    drops_invalid = nft([match(STATE, "invalid", "in"), {"drop": None}], hook="prerouting",
                        priority=-300, policy="accept")  # fmt: skip
    assert fates(drops_invalid, THROUGH, "prerouting") == DROPPED
    assert fates(drops_invalid, THROUGH._replace(tracked=False), "prerouting") == PASSES
    drops_new = [match(STATE, "new", "in"), {"drop": None}]

    assert fates(nft(drops_new, hook="prerouting", priority=-300, policy="accept"), THROUGH,
                 "prerouting") == PASSES  # fmt: skip
    assert fates(nft(drops_new, hook="prerouting", priority=-150, policy="accept"), THROUGH,
                 "prerouting") == DROPPED  # fmt: skip


def test_tables_that_iptables_made_are_left_to_its_own_listing() -> None:
    table = {"family": "ip", "table": "filter"}
    listing = {
        "nftables": [
            {"chain": {**table, "name": "INPUT", "hook": "input", "prio": 0, "policy": "drop"}},
            {"rule": {**table, "chain": "INPUT", "handle": 3,
                      "expr": [{"xt": {"type": "match", "name": "conntrack"}}, ACCEPT]}},
        ]
    }  # fmt: skip

    assert nftrules.made_by_iptables(listing) == {"filter"}
    assert nftrules.chains(listing) == ()


def test_the_text_of_a_rule_is_found_by_its_handle() -> None:
    table = {"family": "inet", "table": "t"}
    listing = {
        "nftables": [
            {"chain": {**table, "name": "c", "hook": "input", "prio": 0, "policy": "accept"}},
            {"rule": {**table, "chain": "c", "handle": 7, "expr": [{"drop": None}]}},
        ]
    }
    text = (
        "table inet t { # handle 1\n\tchain c { # handle 2\n\t\tcounter drop # handle 7\n\t}\n}\n"
    )
    (fate,), _ = judge(nftrules.chains(listing, text), "input", INTO)

    assert fate.cause == "`counter drop` in nft chain inet t c"


WORDS = st.sampled_from(
    ["-A INPUT", "-j", "-g", "-m", "!", "-p", "-s", "--dport", "--ctstate", "tcp", "limit",
     "ACCEPT", "DROP", "INPUT", "1:2", "10.0.0.0/33", "'", "-", "NEW", "--mark", "0x", "a",
     "RETURN", "--syn"]
)  # fmt: skip


@given(st.lists(st.lists(WORDS, max_size=12), max_size=8))
def test_no_listing_of_iptables_makes_it_fail(lines: list[list[str]]) -> None:
    text = "*filter\n:INPUT DROP [0:0]\n:a - [0:0]\n" + "\n".join(
        "-A INPUT " + " ".join(words) for words in lines
    )
    chains = iptrules.chains(text, "iptables")

    assert all(kind in ("drop", "queue") for kind, _ in fates(chains, INTO))


MATCHES = st.sampled_from(
    [Match("proto", ("tcp",)), Match("proto", ("udp",)), Match("unsure"), Match("never"),
     Match("unsure", (), True), Match("never", (), True), Match("dport", ((16000, 16000),))]
)  # fmt: skip
VERDICTS = st.sampled_from(
    [RuleVerdict("accept"), RuleVerdict("drop"), RuleVerdict("return"), RuleVerdict("continue"),
     RuleVerdict("jump", "x"), RuleVerdict("jump", "y"), RuleVerdict("goto", "x"),
     RuleVerdict("goto", "y")]
)  # fmt: skip
RULES = st.lists(
    st.builds(Rule, st.just("r"), st.lists(MATCHES, max_size=2).map(tuple), VERDICTS), max_size=4
).map(tuple)


def walk(rules: dict[str, tuple[Rule, ...]], name: str, answers: list[bool]) -> str | None:
    """What a packet comes to when each doubt is settled by the next answer: the slow twin."""
    for rule in rules[name]:
        applies = True
        for condition in rule.matches:
            if condition.field == "unsure":
                applies &= answers.pop() if answers else True
            elif condition.field == "never":
                applies &= condition.negated
            elif condition.field == "proto":
                applies &= "tcp" in condition.values
        if not applies:
            continue
        kind, target = rule.verdict
        if kind in ("accept", "drop"):
            return kind
        if kind == "return":
            return None
        if kind in ("jump", "goto"):
            found = walk(rules, target, answers)
            if found or kind == "goto":
                return found
    return None


@given(RULES, RULES, st.lists(st.booleans(), max_size=40), st.sampled_from(["accept", "drop"]))
def test_whatever_doubts_come_to_is_among_the_fates(
    base: tuple[Rule, ...], x: tuple[Rule, ...], answers: list[bool], policy: str
) -> None:
    no_loop = tuple(rule for rule in x if rule.verdict.target != "x")
    y = tuple(rule for rule in x if not rule.verdict.target)
    rules = {"base": base, "x": no_loop, "y": y}
    chains = (
        Chain("nft", "ip", "t", "base", base, "input", policy=policy),
        Chain("nft", "ip", "t", "x", no_loop),
        Chain("nft", "ip", "t", "y", y),
    )
    found = fates(chains, INTO)
    end = walk(rules, "base", list(answers)) or policy

    if end == "drop":
        assert found
    else:
        assert ("drop", True) not in found
    if not any(c.field == "unsure" for part in rules.values() for r in part for c in r.matches):
        assert found == (DROPPED if end == "drop" else PASSES)


# As `nft -j list ruleset` of a router shows it (nftables 1.0.6, Linux 6.1).
OFFLOADED: dict[str, Any] = {"match": {"op": "==", "left": {"meta": {"key": "l4proto"}},
                                       "right": {"set": ["tcp", "udp"]}}}  # fmt: skip
ADD = {"flow": {"op": "add", "flowtable": "@ft"}}


def router(*rules: list[dict[str, Any]], policy: str = "accept") -> Chains:
    """A FORWARD chain with a flow table."""
    names = {"family": "inet", "table": "router", "chain": "forward"}
    base = {"family": "inet", "table": "router", "name": "forward", "handle": 1, "type": "filter",
            "hook": "forward", "prio": 0, "policy": policy}  # fmt: skip
    table = {"family": "inet", "name": "ft", "table": "router", "handle": 2, "hook": "ingress",
             "prio": 0, "dev": ["eth0", "eth1"]}  # fmt: skip
    shown = [{"rule": {**names, "handle": 4 + at, "expr": expr}} for at, expr in enumerate(rules)]
    return nftrules.chains({"nftables": [{"flowtable": table}, {"chain": base}, *shown]})


ESTABLISHED = {"match": {"op": "in", "left": {"ct": {"key": "state"}}, "right": ["established"]}}
FROM_SERVER = {"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}},
                         "right": "192.168.0.1"}}  # fmt: skip


@pytest.mark.parametrize(
    ("rules", "packet", "expected"),
    [
        ([[OFFLOADED, ADD]], THROUGH, [("flow", True)]),
        ([[OFFLOADED, ADD]], BACK, [("flow", True)]),
        ([[ADD]], THROUGH._replace(proto="tcp"), [("flow", True)]),
        ([[ESTABLISHED, ADD]], THROUGH, []),
        ([[ESTABLISHED, ADD]], BACK, [("flow", True)]),
        ([[FROM_SERVER, {"accept": None}], [OFFLOADED, ADD]], BACK, []),
        ([[FROM_SERVER, {"accept": None}], [OFFLOADED, ADD]], THROUGH, [("flow", True)]),
        ([[{"limit": {"rate": 5, "per": "second"}}, ADD]], BACK, [("flow", False)]),
        ([[OFFLOADED, ADD], [{"drop": None}]], BACK, [("flow", True), ("drop", True)]),
    ],
)
def test_what_goes_into_a_flow_table_is_seen_and_goes_on(
    rules: list[list[dict[str, Any]]], packet: Packet, expected: list[tuple[str, bool]]
) -> None:
    assert fates(router(*rules), packet, "forward") == expected


def test_the_target_of_iptables_that_offloads_flows_is_known() -> None:
    text = "*filter\n:FORWARD ACCEPT [0:0]\n-A FORWARD -m conntrack --ctstate ESTABLISHED -j "
    chains = iptrules.chains(text + "FLOWOFFLOAD --hw\n", "iptables")

    assert fates(chains, BACK, "forward") == [("flow", True)]
    assert fates(chains, THROUGH, "forward") == PASSES
