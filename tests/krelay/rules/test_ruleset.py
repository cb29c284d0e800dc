"""The rules as text: what they catch is read off golden texts, and their limits are kept."""

import re
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from textwrap import dedent
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.endpoint import Proto
from knet.rules.ports import MULTIPORT_MOST, Ports, merged
from knet.rules.rows import ANYONE, U32_MOST
from krelay.nat.flow import Footprint
from krelay.rules import offloaded, ruleset
from krelay.rules.offloaded import MARK
from krelay.rules.ruleset import chains, iptables_remove, nft_remove
from krelay.rules.spec import (
    RuleSpec,
    instance_name,
    openings,
    queue_of,
    unmatched,
    wanted,
)
from krelay.rules.steprows import DSCP_STEPS, POST, PRE, STEP_ROWS
from krelay.steps import SIDES, Step

S, Z = IPv4Address("192.168.0.1"), IPv4Address("192.168.0.99")
NET, OTHER = IPv4Network("192.168.0.0/24"), IPv4Network("10.9.0.0/16")
MOST_CHAIN_NAME = 28
"""linux/netfilter/x_tables.h: XT_EXTENSION_MAXNAMELEN is 29, with the zero behind it."""

SPEC = RuleSpec(
    name="krelay",
    queue=1600,
    tcp=((80, 80), (8000, 8100)),
    udp=((53, 53),),
    gports=(16000, 17000),
    servers=(S,),
    relay_clients=(NET,),
)

port_ranges = st.lists(
    st.tuples(st.integers(1, 400), st.integers(0, 30)).map(lambda r: (r[0], r[0] + r[1])),
    max_size=60,
)


def unlabelled(rule: str) -> str:
    """The rule without its label.  The comment of a place for a queue is none."""
    if rule.startswith("drop comment"):
        return rule
    return re.sub(r' comment "[^"]*"| -m comment --comment "[^"]*"', "", rule)


def nft_rules(spec: RuleSpec, *, with_xt: bool = False) -> dict[str, list[str]]:
    """What nft is told to do by chain, without labels."""
    made = ruleset.nft_rules(spec, with_xt=with_xt)
    return {chain: list(map(unlabelled, lines)) for chain, lines in made.items()}


def nft_install(spec: RuleSpec, **options: Any) -> str:
    """The transaction, without labels."""
    return "\n".join(map(unlabelled, ruleset.nft_install(spec, **options).split("\n")))


def iptables_install(spec: RuleSpec, hung: frozenset[str]) -> str:
    """The input of iptables-restore, without labels."""
    return "\n".join(map(unlabelled, ruleset.iptables_install(spec, hung).split("\n")))


def rules(text: str, hook: str) -> list[str]:
    """The rules of a chain, in short: what all have in common is left out."""
    if "table ip krelay" in text:
        bodies = re.findall(rf"chain {hook}(?:-tcp|-udp)? {{\n(.*?)\n  }}", text, re.DOTALL)
        lines = [line.strip() for body in bodies for line in body.splitlines()]
        lines = [line.replace(" goto openings", " SYNs") for line in lines]
        return [line.replace(" goto to-worker", " Q") for line in lines]
    lines = re.findall(rf"^-A krelay-{hook} (.*)$", text, re.MULTILINE)
    return [
        re.sub(r"-m multiport --", "", line)
        .replace("-p icmp -m u32 --u32 0>>22&0x3C@0>>24=3,11,12", "error")
        .replace("0>>22&0x3C", "quote")
        .replace("-m addrtype --dst-type LOCAL", "to-us")
        .replace("-m addrtype --src-type LOCAL", "from-us")
        .replace("-j NFQUEUE --queue-num 1600", "Q")
        .replace("-j NFQUEUE --queue-num 34368", "SYNs")
        for line in lines
    ]


def lines_of(text: str) -> list[str]:
    return dedent(text).strip().splitlines()


# What nft is told


def test_the_nft_rules_of_prerouting() -> None:
    assert rules(nft_install(SPEC), "pre") == lines_of("""
        ip protocol tcp goto pre-tcp
        ip protocol udp goto pre-udp
        iif "lo" return
        icmp type { 3, 11, 12 } fib daddr type local Q
        icmp type { 3, 11, 12 } @th,192,32 { 0xc0a80001 } Q
        icmp type { 3, 11, 12 } @th,160,32 { 0xc0a80001 } Q
        iif "lo" return
        tcp dport { 16000, 17000 } fib daddr type local Q
        tcp dport { 80, 8000-8100 } fib daddr type local tcp flags & (syn | ack) == syn SYNs
        tcp dport { 80, 8000-8100 } fib daddr type local Q
        ip saddr { 192.168.0.1 } tcp sport { 80, 8000-8100 } Q
        ip daddr { 192.168.0.1 } tcp dport { 80, 8000-8100 } Q
        iif "lo" return
        udp dport { 53 } fib daddr type local Q
        ip daddr { 192.168.0.1 } udp dport { 53 } Q
        ip saddr { 192.168.0.1 } udp sport { 53 } fib daddr type local Q
        ip daddr 255.255.255.255 udp dport 0 tproxy to :9
    """)


def test_the_nft_rules_of_postrouting() -> None:
    assert rules(nft_install(SPEC), "post") == lines_of("""
        ip protocol udp ip saddr != { 192.168.0.1 } ip saddr & 255.255.255.0 != 192.168.0.0 iif != 0 th sport != 53 accept
        ip protocol tcp goto post-tcp
        ip protocol udp goto post-udp
        icmp type { 3, 11, 12 } @th,192,32 { 0xc0a80001 } @th,240,16 { 53, 80, 8000-8100 } Q
        icmp type { 3, 11, 12 } @th,160,32 { 0xc0a80001 } @th,224,16 { 53, 80, 8000-8100 } Q
        icmp type { 3, 11, 12 } @th,192,32 { 0xc0a80001 } @th,68,4 != 5 Q
        icmp type { 3, 11, 12 } @th,160,32 { 0xc0a80001 } @th,68,4 != 5 Q
        icmp type 5 @th,192,32 { 0xc0a80001 } drop
        icmp type 5 @th,160,32 { 0xc0a80001 } drop
        oif "lo" return
        tcp sport { 16000, 17000 } fib saddr type local Q
        ip daddr { 192.168.0.1 } tcp dport { 80, 8000-8100 } fib saddr type local Q
        tcp flags & (syn | ack) == syn tcp sport { 80, 8000-8100 } fib saddr type local Q
        oif "lo" return
        ip saddr { 192.168.0.1 } udp sport { 53 } Q
        ip daddr { 192.168.0.1 } udp dport { 53 } fib saddr type local Q
        ip saddr & 255.255.255.0 == 192.168.0.0 ip daddr { 192.168.0.1 } udp dport { 53 } Q
        udp sport { 53 } fib saddr type local Q
    """)  # noqa: E501


def test_nft_replaces_the_table_in_one_transaction() -> None:
    text = nft_install(SPEC)

    assert text.startswith("add table ip krelay\ndelete table ip krelay\ntable ip krelay {\n")
    assert text.count("{") == text.count("}")
    assert "hook prerouting priority -300; policy accept;" in text
    assert "hook postrouting priority 300; policy accept;" in text
    assert nft_remove("krelay") == "add table ip krelay\ndelete table ip krelay\n"


def test_nft_puts_every_packet_into_one_of_two_queues_or_has_the_place_for_that() -> None:
    own = nft_rules(SPEC)
    with_xt = nft_rules(SPEC, with_xt=True)

    assert (own["to-worker"], own["openings"]) == (["queue num 1600"], ["queue num 34368"])
    assert with_xt == own | {
        "to-worker": ['drop comment "queue num 1600"'],
        "openings": ['drop comment "queue num 34368"'],
    }
    assert [queue_of(with_xt[chain][0]) for chain in ("to-worker", "openings")] == [1600, 34368]
    assert openings(openings(1600)) == 1600 != openings(1600)


def test_rules_alone_are_replaced_without_the_maps_nor_the_queues() -> None:
    text = nft_install(replace(SPEC, room=1000), afresh=False)

    assert "delete" not in text
    assert "queue num" not in text
    for chain in ("pre", "pre-tcp", "pre-udp", "post", "post-tcp", "post-udp"):
        assert text.count(f"flush chain ip krelay {chain}\n") == 1


def test_rules_that_replace_others_leave_the_chain_with_the_program_alone() -> None:
    spec = replace(SPEC, room=1000, lets_offloaded_pass=True)
    text = nft_install(replace(spec, tcp=()), afresh=False)
    for chain in ("offloaded", "to-worker", "openings"):
        assert not re.search(rf"(flush|delete) chain ip krelay {chain}\n", text)
        assert f"chain {chain} {{" not in text
    assert "jump offloaded" in text


# The fast path

OFFLOADING = replace(SPEC, room=1000, lets_offloaded_pass=True, learnt_to=S)
ASKS = "rt ipsec missing jump offloaded"
REWRITTEN = "meta priority 6b72:6c79 accept"
LEARNT = (
    f"meta priority 6b73:{offloaded.learnt('krelay') & 0xFFFF:x} ip daddr set 192.168.0.1 accept"
)


def fast(spec: RuleSpec) -> dict[str, list[str]]:
    """By chain, the rules by which packets of offloaded flows go past all others."""
    made = nft_rules(spec)
    return {
        chain: found
        for chain, lines in made.items()
        if (found := [rule for rule in lines if rule in (REWRITTEN, LEARNT, ASKS)])
    }


def test_what_comes_in_rewritten_meets_no_other_rule() -> None:
    assert fast(OFFLOADING)["pre"][0] == REWRITTEN
    assert offloaded.PRIORITY == 0x6B726C79


def test_a_query_that_began_a_flow_by_itself_is_sent_to_the_server_here() -> None:
    assert fast(OFFLOADING)["pre"] == [REWRITTEN, LEARNT]
    others = {offloaded.learnt(name) for name in ("krelay", "krelay-0badcafe", "krelay-00000001")}
    assert len(others) == 3
    assert not others & {offloaded.PRIORITY, 0}


def test_no_rule_asks_for_a_mark_or_sets_one_and_that_of_the_program_has_one_bit() -> None:
    assert not [
        rule for rules in nft_rules(OFFLOADING).values() for rule in rules if "mark" in rule
    ]
    assert MARK.bit_count() == 1


def test_of_what_goes_out_a_program_is_asked_in_a_chain_that_has_the_place_for_that() -> None:
    assert fast(OFFLOADING).keys() == {"pre", "post"}
    assert fast(OFFLOADING)["post"] == [ASKS]
    assert nft_rules(OFFLOADING)["offloaded"] == []


@pytest.mark.parametrize("forwarded", [(), ((443, 443),)])
def test_the_fast_path_comes_before_every_other_rule(forwarded: Ports) -> None:
    made = nft_rules(replace(EVERYTHING, forwarded=forwarded))

    for chain, rules in fast(EVERYTHING).items():
        assert made[chain][: len(rules)] == rules
    assert made["pre"][2].endswith("goto pre-tcp")


def test_where_no_program_rewrites_there_is_no_fast_path() -> None:
    for spec in (SPEC, replace(SPEC, room=1000)):
        assert fast(spec) == {}
        assert "offloaded" not in nft_rules(spec)
        assert "offloaded" not in ruleset.nft_install(spec)


def test_iptables_has_nothing_of_the_fast_path() -> None:
    text = ruleset.iptables_install(OFFLOADING, frozenset())

    assert text == ruleset.iptables_install(SPEC, frozenset())
    for word in ("mark", "offloaded", "bpf"):
        assert word not in text


def test_no_flow_has_an_element_in_the_rules() -> None:
    text = ruleset.nft_install(OFFLOADING)

    assert "map " not in text
    assert not re.search(r"^  (set|counter) ", text, re.MULTILINE)


def test_what_programs_rewrite_goes_to_the_worker_where_they_do_not() -> None:
    """Each step's packets are queued behind the fast path, as without it."""
    for chain, rules in nft_rules(replace(SPEC, room=1000)).items():
        behind = nft_rules(OFFLOADING)[chain]
        assert [rule for rule in behind if rule not in fast(OFFLOADING).get(chain, [])] == rules


FIN, SYN, RST, ACK = 1, 2, 4, 16


@pytest.mark.parametrize(
    ("steps", "hook", "flags"),
    [
        ((Step.T1,), PRE, (SYN | RST, 0)),
        ((Step.T4,), PRE, (RST | ACK, ACK)),
        ((Step.T2, Step.T3), POST, (RST | ACK, ACK)),
        ((Step.U12, Step.U1, Step.U3), PRE, (FIN | SYN | RST, 0)),
        ((Step.U34, Step.U2, Step.U4), POST, (FIN | SYN | RST, 0)),
    ],
)
def test_each_step_has_its_hook_and_packets_that_begin_or_break_are_the_workers(
    steps: tuple[Step, ...], hook: str, flags: tuple[int, int]
) -> None:
    for step in steps:
        assert (STEP_ROWS[step].hook, STEP_ROWS[step].flags) == (hook, flags)
        mask, value = flags
        for refused in (SYN, RST, RST | ACK):
            assert refused & mask != value


def test_every_step_but_those_of_direct_connections_has_its_row() -> None:
    assert set(Step) - STEP_ROWS.keys() == {Step.D1, Step.D2}


def test_only_packets_of_the_ends_are_known_by_their_dscp() -> None:
    assert set(DSCP_STEPS) == {Step.T1, Step.T4}
    assert set(DSCP_STEPS) <= set(SIDES)


DONE = "ip protocol udp ip saddr != { 192.168.0.1 } "


@pytest.mark.parametrize(
    ("clients", "rule"),
    [
        ((), DONE + "th sport != 53 accept"),
        ((NET,), DONE + "ip saddr & 255.255.255.0 != 192.168.0.0 iif != 0 th sport != 53 accept"),
        (
            (NET, OTHER),
            DONE + "ip saddr != { 192.168.0.0/24, 10.9.0.0/16 } iif != 0 th sport != 53 accept",
        ),
    ],
)
def test_datagrams_that_no_rule_asks_for_go_out_past_the_rules(
    clients: tuple[IPv4Network, ...], rule: str
) -> None:
    spec = replace(OFFLOADING, relay_clients=clients)

    assert nft_rules(spec)["post"][1] == rule


def test_few_ports_are_compared_and_many_looked_up() -> None:
    few, many = ((53, 53), (500, 510)), tuple((port, port) for port in range(1, 11, 2))

    def done(ports: Ports) -> str:
        return nft_rules(replace(SPEC, udp=ports, relay_clients=()))["post"][0]

    assert done(few) == DONE + "th sport != 53 th sport != 500-510 accept"
    assert done(many) == DONE + "th sport != { 1, 3, 5, 7, 9 } accept"


def test_where_any_datagram_may_be_asked_for_none_goes_out_past_the_rules() -> None:
    spec = replace(SPEC, relay_clients=(ANYONE,))

    assert not [rule for rule in nft_rules(spec)["post"] if "accept" in rule]


# What iptables is told


def test_the_iptables_rules_of_prerouting() -> None:
    assert rules(iptables_install(SPEC, frozenset()), "pre") == lines_of("""
        -i lo -j RETURN
        error to-us Q
        error&&quote@24=0xc0a80001 Q
        error&&quote@20=0xc0a80001 Q
        -p tcp dports 16000,17000 to-us Q
        -p tcp --tcp-flags SYN,ACK SYN dports 80,8000:8100 to-us SYNs
        -p tcp dports 80,8000:8100 to-us Q
        -s 192.168.0.1 -p tcp sports 80,8000:8100 Q
        -d 192.168.0.1 -p tcp dports 80,8000:8100 Q
        -p udp dports 53 to-us Q
        -d 192.168.0.1 -p udp dports 53 Q
        -s 192.168.0.1 -p udp sports 53 to-us Q
        -d 255.255.255.255/32 -p udp --dport 0 -m socket -j RETURN
    """)


def test_the_iptables_rules_of_postrouting() -> None:
    assert rules(iptables_install(SPEC, frozenset()), "post") == lines_of("""
        error&&quote@24=0xc0a80001&&quote@28&0xFFFF=53,80,8000:8100 Q
        error&&quote@20=0xc0a80001&&quote@28>>16=53,80,8000:8100 Q
        error&&quote@24=0xc0a80001&&quote@8>>24&0xF=6:15 Q
        error&&quote@20=0xc0a80001&&quote@8>>24&0xF=6:15 Q
        -p icmp -m u32 --u32 quote@0>>24=5&&quote@24=0xc0a80001 -j DROP
        -p icmp -m u32 --u32 quote@0>>24=5&&quote@20=0xc0a80001 -j DROP
        -o lo -j RETURN
        -p tcp sports 16000,17000 from-us Q
        -d 192.168.0.1 -p tcp dports 80,8000:8100 from-us Q
        -p tcp --tcp-flags SYN,ACK SYN sports 80,8000:8100 from-us Q
        -s 192.168.0.1 -p udp sports 53 Q
        -d 192.168.0.1 -p udp dports 53 from-us Q
        -s 192.168.0.0/24 -d 192.168.0.1 -p udp dports 53 Q
        -p udp sports 53 from-us Q
    """)


def test_iptables_hangs_its_chains_first_in_what_leaves_and_then_in_what_comes() -> None:
    small = replace(SPEC, tcp=(), udp=(), gports=(16000,), servers=())

    assert iptables_install(small, frozenset()).splitlines() == lines_of("""
        *mangle
        :krelay-post - [0:0]
        -A krelay-post -o lo -j RETURN
        -A krelay-post -p tcp -m multiport --sports 16000 -m addrtype --src-type LOCAL -j NFQUEUE --queue-num 1600
        -I POSTROUTING 1 -j krelay-post
        COMMIT
        *raw
        :krelay-pre - [0:0]
        -A krelay-pre -i lo -j RETURN
        -A krelay-pre -p icmp -m u32 --u32 0>>22&0x3C@0>>24=3,11,12 -m addrtype --dst-type LOCAL -j NFQUEUE --queue-num 1600
        -A krelay-pre -p tcp -m multiport --dports 16000 -m addrtype --dst-type LOCAL -j NFQUEUE --queue-num 1600
        -A krelay-pre -d 255.255.255.255/32 -p udp --dport 0 -m socket -j RETURN
        -I PREROUTING 1 -j krelay-pre
        COMMIT
    """)  # noqa: E501


# What each rule is for


EVERYTHING = replace(
    SPEC,
    room=1000,
    forwarded=((443, 443),),
    lets_offloaded_pass=True,
    learnt_to=S,
    any_port=((53, 53),),
    asked_within=300,
    tells_unmatched=True,
)


@pytest.mark.parametrize("spec", [SPEC, EVERYTHING], ids=["queue", "everything"])
def test_each_rule_says_what_it_is_for(spec: RuleSpec) -> None:
    for chain, lines in ruleset.nft_rules(spec).items():
        if chain not in ("to-worker", "openings"):
            assert all(re.search(r' comment "[\w ,]+"$', rule) for rule in lines), chain
    for line in ruleset.iptables_install(spec, frozenset()).splitlines():
        # what is only passed over doesn't pay for a match
        shows = '-m comment --comment "' in line
        assert shows is (line.startswith("-A krelay-") and " lo -j RETURN" not in line), line


def test_a_steps_rules_are_found_by_its_label() -> None:
    made = ruleset.nft_rules(EVERYTHING)

    def of(label: str) -> list[str]:
        return [
            f"{chain}: {unlabelled(rule)}"
            for chain, lines in made.items()
            for rule in lines
            if re.search(rf'comment "(?:[\w,]+,)?{label}(?:,\w+)*"', rule)
        ]

    def iptables_of(label: str) -> list[str]:
        return [
            rule
            for hook in ruleset.iptables_rules(SPEC)
            for rule in hook
            if f'--comment "{label}"' in rule
        ]

    assert of("offloaded") == [
        f"pre: {REWRITTEN}",
        f"post: {ASKS}",
    ]
    assert of("T3") == [
        f"post-tcp: ip daddr {{ {S} }} tcp dport {{ 80, 8000-8100 }} fib saddr type local "
        "goto to-worker",
    ]
    for step in Step:
        found = of(step.label)
        assert found or step is Step.D2, step
    assert [rule.split(" -m ")[0] for rule in iptables_of("T3")] == ["-d 192.168.0.1 -p tcp"]


@pytest.mark.parametrize("hung", [(), ("krelay-pre",), ("krelay-pre", "krelay-post")])
def test_iptables_hangs_no_chain_twice(hung: tuple[str, ...]) -> None:
    text = iptables_install(SPEC, frozenset(hung))

    for name in ("krelay-pre", "krelay-post"):
        assert text.count(f"1 -j {name}\n") == (name not in hung)


def test_iptables_removes_what_is_there_beginning_with_what_comes() -> None:
    both = frozenset({"krelay-pre", "krelay-post"})

    assert iptables_remove("krelay", both, both).splitlines() == lines_of("""
        *raw
        -D PREROUTING -j krelay-pre
        -F krelay-pre
        -X krelay-pre
        COMMIT
        *mangle
        -D POSTROUTING -j krelay-post
        -F krelay-post
        -X krelay-post
        COMMIT
    """)
    assert iptables_remove("krelay", frozenset(), frozenset({"krelay-post"})).splitlines() == [
        "*mangle", "-F krelay-post", "-X krelay-post", "COMMIT",
    ]  # fmt: skip
    assert iptables_remove("krelay", frozenset(), frozenset()).strip() == ""


# Both


@pytest.mark.parametrize("text", [nft_install(SPEC), iptables_install(SPEC, frozenset())])
def test_no_rule_lets_packets_by_when_nobody_serves_the_queue(text: str) -> None:
    assert "bypass" not in text
    rules_that_queue = 12 + 9 if "iptables" in text or "-A krelay" in text else 1
    assert text.count("queue num 1600") + text.count("--queue-num 1600") == rules_that_queue


def test_each_server_has_its_rules() -> None:
    two = replace(SPEC, servers=(S, Z))

    assert "ip saddr { 192.168.0.1, 192.168.0.99 }" in nft_install(two)
    assert "@th,192,32 { 0xc0a80001, 0xc0a80063 }" in nft_install(two)
    text = iptables_install(two, frozenset())
    assert text.count("-s 192.168.0.1 ") == text.count("-s 192.168.0.99 ") == 3
    assert text.count("-d 192.168.0.1 ") == text.count("-d 192.168.0.99 ") == 5
    assert text.count("@24=0xc0a80001") == text.count("@24=0xc0a80063") == 4


def test_without_clients_of_source_relay_no_udp_packet_to_the_server_is_queued_twice() -> None:
    none = replace(SPEC, relay_clients=())

    for text in (nft_install(none), iptables_install(none, frozenset())):
        assert not [rule for rule in rules(text, "post") if "udp" in rule and "dport" in rule]


def test_with_source_relay_anyones_udp_packets_to_the_server_are_queued_on_their_way_out() -> None:
    anyone = replace(SPEC, relay_clients=(ANYONE,))

    assert "ip daddr { 192.168.0.1 } udp dport { 53 } Q" in rules(nft_install(anyone), "post")
    assert "-s 0.0.0.0/0 -d 192.168.0.1 -p udp dports 53 Q" in rules(
        iptables_install(anyone, frozenset()), "post"
    )


@pytest.mark.parametrize(("proto", "other"), [("tcp", "udp"), ("udp", "tcp")])
def test_no_service_of_a_protocol_makes_no_rule_of_it_but_the_gateways(
    proto: str, other: str
) -> None:
    bare = replace(SPEC, tcp=() if proto == "tcp" else SPEC.tcp, udp=())
    bare = replace(bare, udp=() if proto == "udp" else SPEC.udp)

    for text in (nft_install(bare), iptables_install(bare, frozenset())):
        services = [
            rule
            for hook in ("pre", "post")
            for rule in rules(text, hook)
            if "Q" in rule and "16000" not in rule and not rule.startswith(("icmp", "error"))
        ]
        assert services
        assert all(other in rule for rule in services)
        assert "{  }" not in text


@given(port_ranges)
def test_multiport_matches_have_15_slots_and_name_every_port_once(
    ranges: list[tuple[int, int]],
) -> None:
    spec = replace(SPEC, tcp=merged(ranges), udp=(), gports=(16000,))
    text = iptables_install(spec, frozenset())

    matches = re.findall(r"-A krelay-pre -p tcp -m multiport --dports (\S+) -m addr", text)
    named: list[int] = []
    for match in matches[1:]:  # the first is the gateway port's
        assert len(re.split("[,:]", match)) <= MULTIPORT_MOST
        for part in match.split(","):
            low, _, high = part.partition(":")
            named += range(int(low), int(high or low) + 1)
    assert named == sorted({p for low, high in ranges for p in range(low, high + 1)})


def test_fifteen_single_ports_fill_one_match() -> None:
    for count, expected in ((15, 1), (16, 2), (30, 2), (31, 3)):
        spec = replace(SPEC, tcp=tuple((p, p) for p in range(1, 2 * count, 2)), udp=())
        text = iptables_install(spec, frozenset())
        assert text.count("-A krelay-pre -p tcp -m multiport --dports") == 1 + expected


@given(port_ranges)
def test_u32_tests_have_ten_slots_and_name_every_port_once(
    ranges: list[tuple[int, int]],
) -> None:
    spec = replace(SPEC, tcp=merged(ranges), udp=())
    text = iptables_install(spec, frozenset())

    named: list[int] = []
    for match in re.findall(r"@28&0xFFFF=(\S+) ", text):
        parts = match.split(",")
        assert len(parts) <= U32_MOST
        for part in parts:
            low, _, high = part.partition(":")
            named += range(int(low), int(high or low) + 1)
    assert named == sorted({p for low, high in ranges for p in range(low, high + 1)})


# wanted


def spec_for(*footprints: Footprint, source_is_relay: bool = False) -> RuleSpec:
    return wanted(
        name="krelay",
        queue=1600,
        tcp=[(443, 443), (80, 80)],
        udp=[(53, 53)],
        gport=17000,
        server=S,
        source_is_relay=source_is_relay,
        beside=[NET, NET],
        footprints=footprints,
    )


def test_without_flows_the_rules_are_those_of_the_config() -> None:
    assert spec_for() == RuleSpec(
        "krelay", 1600, ((80, 80), (443, 443)), ((53, 53),), (17000,), (S,), (NET,)
    )


def test_flows_keep_what_they_need_in_the_rules() -> None:
    spec = spec_for(
        Footprint(Proto.TCP, 8080, 16000, Z.packed, False),
        Footprint(Proto.UDP, 123, None, S.packed, False),
        Footprint(Proto.TCP, 80, 17000, S.packed, False),
    )

    assert spec.tcp == ((80, 80), (443, 443), (8080, 8080))
    assert spec.udp == ((53, 53), (123, 123))
    assert spec.gports == (16000, 17000)
    assert spec.servers == (S, Z)
    assert spec.relay_clients == (NET,)


def test_tcp_that_is_forwarded_is_caught_as_udp_is() -> None:
    spec = replace(SPEC, forwarded=((443, 443),), gports=())
    without = replace(SPEC, gports=())
    added = {
        hook: [
            r for r in rules(nft_install(spec), hook) if r not in rules(nft_install(without), hook)
        ]
        for hook in ("pre", "post")
    }

    every, syns = "{ 80, 443, 8000-8100 }", "tcp flags & (syn | ack) == syn SYNs"
    assert [r for r in added["pre"] if every not in r and "@th" not in r] == [
        f"ip saddr {{ {S} }} tcp sport {{ 443 }} fib daddr type local Q"
    ]
    assert f"tcp dport {every} fib daddr type local {syns}" in added["pre"]
    assert [r for r in added["post"] if every not in r and "@th" not in r] == [
        f"ip saddr {{ {S} }} tcp sport {{ 443 }} Q",
        f"ip saddr & 255.255.255.0 == 192.168.0.0 ip daddr {{ {S} }} tcp dport {{ 443 }} Q",
        "iif != 0 return",
        f"ip daddr {{ {S} }} tcp dport {{ 443 }} fib saddr type local Q",
    ]
    text = iptables_install(spec, frozenset())
    assert {
        f"-s {S} -p tcp dports 443 to-us Q".replace("dports", "sports"),
        "-p tcp --tcp-flags SYN,ACK SYN dports 80,443,8000:8100 to-us SYNs",
    } <= set(rules(text, "pre"))
    assert {f"-s {S} -p tcp sports 443 Q", f"-s {NET} -d {S} -p tcp dports 443 Q"} <= set(
        rules(text, "post")
    )
    assert not [r for r in rules(text, "pre") if r.startswith(f"-s {S} -p tcp sports 80,443")]


ASKING = "ip saddr . udp sport"
ANSWERED = "ip daddr . udp dport"


def added(spec: RuleSpec, without: RuleSpec, hook: str, text: str = "nft") -> list[str]:
    """The rules of a chain that only the first has."""
    both = [
        nft_install(each) if text == "nft" else iptables_install(each, frozenset())
        for each in (spec, without)
    ]
    return [rule for rule in rules(both[0], hook) if rule not in rules(both[1], hook)]


def noted(end: str) -> str:
    return f"update @askers {{ {end} timeout 300s }}"


def test_where_any_port_may_answer_the_kernel_notes_who_asks() -> None:
    spec = replace(SPEC, udp=((53, 53), (69, 69)), any_port=((69, 69),), asked_within=300)
    without = replace(spec, any_port=(), asked_within=0)
    net = "ip saddr & 255.255.255.0 == 192.168.0.0"

    assert added(spec, without, "pre") == [
        f"udp dport {{ 69 }} fib daddr type local {noted(ASKING)}",
        f"{ASKING} @askers fib daddr type local {noted(ASKING)} Q",
        f"ip saddr {{ {S} }} fib daddr type local Q",
    ]
    assert added(spec, without, "post") == [
        f"ip daddr {{ {S} }} udp dport {{ 69 }} {noted(ASKING)}",
        f"ip saddr {{ {S} }} {ANSWERED} @askers {noted(ANSWERED)} Q",
        f"{net} ip daddr {{ {S} }} {ASKING} @askers Q",
    ]
    assert "set askers { type ipv4_addr . inet_service; flags dynamic, timeout;" in nft_install(
        spec
    )
    assert "askers" not in nft_install(without)


def test_where_the_kernel_notes_nobody_all_datagrams_of_the_server_are_queued() -> None:
    spec = replace(SPEC, any_port=((53, 53),))
    net = "ip saddr & 255.255.255.0 == 192.168.0.0"

    assert added(spec, SPEC, "pre") == ["fib daddr type local Q"]
    assert added(spec, SPEC, "post") == [f"ip saddr {{ {S} }} Q", f"{net} ip daddr {{ {S} }} Q"]
    assert added(spec, SPEC, "pre", "iptables") == ["-p udp to-us Q"]
    assert added(spec, SPEC, "post", "iptables") == [
        f"-s {S} -p udp Q",
        f"-s {NET} -d {S} -p udp Q",
    ]


def test_who_has_asked_is_known_on_when_rules_change() -> None:
    spec = replace(SPEC, room=2048, any_port=((53, 53),), asked_within=300)
    text = nft_install(spec, afresh=False)
    assert "set askers {" in text
    assert not re.search(r"(delete|flush) (set|table)", text)


def test_some_of_what_servers_send_elsewhere_is_copied() -> None:
    spec = replace(SPEC, tells_unmatched=True)
    told = f"limit rate 32/second burst 64 packets log group {unmatched(1600)} snaplen 28"

    assert added(spec, SPEC, "pre") == [f"ip saddr {{ {S} }} fib daddr type local {told}"]
    assert added(spec, SPEC, "post") == [f"ip saddr {{ {S} }} {told}"]
    assert rules(nft_install(spec), "post").index(added(spec, SPEC, "post")[0]) > rules(
        nft_install(spec), "post"
    ).index(f"ip saddr {{ {S} }} udp sport {{ 53 }} Q")
    assert added(replace(spec, udp=()), replace(SPEC, udp=()), "post") == []
    assert unmatched(unmatched(1600)) == 1600 != unmatched(1600)


def test_flows_keep_the_rules_of_services_that_any_port_may_answer() -> None:
    flow = Footprint(Proto.UDP, 69, None, S.packed, False, False, True)

    assert spec_for(flow).any_port == ((69, 69),)
    assert spec_for().any_port == ()


def test_flows_that_are_forwarded_keep_their_rules_and_need_no_gateway_port() -> None:
    flow = Footprint(Proto.TCP, 8080, None, Z.packed, False, True)
    nothing: tuple[tuple[int, int], ...] = ()
    spec = wanted(
        name="krelay", queue=1600, tcp=nothing, udp=nothing, gport=None, server=S,
        source_is_relay=False, beside=[], footprints=[flow], forwarded=[(443, 443)],
    )  # fmt: skip

    assert (spec.tcp, spec.forwarded, spec.gports) == ((), ((443, 443), (8080, 8080)), ())
    for text in (nft_install(spec), iptables_install(spec, frozenset())):
        assert "{  }" not in text
        assert "16000" not in text


def test_anyones_source_is_changed_with_source_relay_and_while_a_flow_needs_it() -> None:
    assert spec_for(source_is_relay=True).relay_clients == (ANYONE,)
    flow = Footprint(Proto.UDP, 53, None, S.packed, True)
    assert spec_for(flow).relay_clients == (ANYONE,)


def test_equal_needs_in_another_order_make_equal_specs() -> None:
    needs = [
        Footprint(Proto.TCP, 8080, 16000, Z.packed, False),
        Footprint(Proto.UDP, 123, None, S.packed, False),
    ]

    assert spec_for(*needs) == spec_for(*reversed(needs))


# Names


def test_two_trees_have_two_names_and_the_default_tree_the_plain_one() -> None:
    names = [instance_name(root, "/run/krelay") for root in ("/run/krelay", "/run/two", "/run/3")]

    assert names[0] == "krelay"
    assert len(set(names)) == 3
    assert names == [instance_name(r, "/run/krelay") for r in ("/run/krelay", "/run/two", "/run/3")]
    used = [chain.name for name in names for chain in chains(name)]
    assert len(set(used)) == 6


@given(st.text(max_size=300))
def test_chain_names_fit_and_are_words(root: str) -> None:
    name = instance_name(root, "/run/krelay")

    for chain in chains(name):
        assert len(chain.name) <= MOST_CHAIN_NAME
        assert re.fullmatch(r"krelay[0-9a-z-]*", chain.name)
    assert [(chain.table, chain.builtin) for chain in chains(name)] == [
        ("raw", "PREROUTING"),
        ("mangle", "POSTROUTING"),
    ]
