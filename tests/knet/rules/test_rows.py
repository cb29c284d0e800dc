"""Rows as both tools write them."""

from ipaddress import IPv4Address, IPv4Network

import pytest

from knet.rules.rows import (
    ANYONE,
    Ending,
    Flags,
    Icmp,
    IsLocal,
    OneOf,
    OnLink,
    Port,
    QuotedAddress,
    QuotedPort,
    RowAction,
    RowMatch,
    RuleRow,
    Statement,
    Tool,
    ToQueue,
    Transport,
    Within,
    Words,
    iptables_rules,
    nft_rules,
)

S, Z = IPv4Address("192.168.0.1"), IPv4Address("192.168.0.99")
NETS = IPv4Network("10.9.0.0/16"), IPv4Network("10.8.0.0/16")
QUEUE = ToQueue("to-worker", 7)


def row(*match: RowMatch, action: RowAction = Ending.DROP, label: str = "") -> RuleRow:
    return RuleRow(label, "pre", match, action)


@pytest.mark.parametrize(
    ("match", "nft", "iptables"),
    [
        (OnLink("i", "lo"), 'iif "lo"', ["-i lo"]),
        (OneOf("saddr", (S, Z)), f"ip saddr {{ {S}, {Z} }}", [f"-s {S}", f"-s {Z}"]),
        (Within("daddr", (ANYONE,)), "", ["-d 0.0.0.0/0"]),
        (Within("saddr", NETS[:1]), "ip saddr & 255.255.0.0 == 10.9.0.0", ["-s 10.9.0.0/16"]),
        (
            Within("saddr", NETS, "!="),
            "ip saddr != { 10.9.0.0/16, 10.8.0.0/16 }",
            ["-s 10.9.0.0/16", "-s 10.8.0.0/16"],
        ),
        (
            Port("udp", "dport", ((53, 53), (60, 70))),
            "udp dport { 53, 60-70 }",
            ["-p udp -m multiport --dports 53,60:70"],
        ),
        (Transport("udp"), "", ["-p udp"]),
        (
            Flags(("syn", "ack"), ("syn",)),
            "tcp flags & (syn | ack) == syn",
            ["-p tcp --tcp-flags SYN,ACK SYN"],
        ),
        (Flags(("rst",), ()), "tcp flags & (rst) == 0", ["-p tcp --tcp-flags RST NONE"]),
        (IsLocal("daddr"), "fib daddr type local", ["-m addrtype --dst-type LOCAL"]),
        (Icmp((5,)), "icmp type 5", ["-p icmp -m u32 --u32 0>>22&0x3C@0>>24=5"]),
        (
            QuotedAddress("saddr", (S,)),
            "@th,160,32 { 0xc0a80001 }",
            ["-m u32 --u32 0>>22&0x3C@20=0xc0a80001"],
        ),
        (
            QuotedPort("dport", ((80, 80), (90, 99))),
            "@th,240,16 { 80, 90-99 }",
            ["-m u32 --u32 0>>22&0x3C@28&0xFFFF=80,90:99"],
        ),
        (Words("ip ttl < 2"), "ip ttl < 2", []),
        (Words("ip ttl < 2", "-m ttl --ttl-lt 2"), "ip ttl < 2", ["-m ttl --ttl-lt 2"]),
    ],
)
def test_a_match_as_both_tools_write_it(match: RowMatch, nft: str, iptables: list[str]) -> None:
    assert row(match).nft() == f"{nft} drop".strip()
    assert row(match).iptables() == [f"{each} -j DROP" for each in iptables]


def test_options_stand_in_the_order_of_iptables_and_u32_tests_are_one_match() -> None:
    made = row(IsLocal("saddr"), Flags(("syn",), ("syn",)), Port("tcp", "sport", ((1, 1),)),
               OneOf("daddr", (S,)))  # fmt: skip
    assert made.iptables() == [
        f"-d {S} -p tcp --tcp-flags SYN SYN -m multiport --sports 1 "
        "-m addrtype --src-type LOCAL -j DROP"
    ]
    (rule,) = row(Icmp((3, 11)), QuotedAddress("daddr", (S,))).iptables()
    assert rule.count("-m u32") == 1
    assert "=3,11&&0>>22" in rule


def test_each_of_several_values_has_its_rule_in_iptables() -> None:
    made = row(OneOf("saddr", (S, Z)), Within("daddr", NETS))
    assert len(made.iptables()) == 4
    assert len(nft_rules([made])["pre"]) == 1


@pytest.mark.parametrize(
    ("action", "nft", "iptables"),
    [
        (QUEUE, 'goto to-worker comment "T3"', '-m comment --comment "T3" -j NFQUEUE '
                                               "--queue-num 7"),
        (Ending.RETURN, 'return comment "T3"', "-j RETURN"),
        (Statement("notrack"), 'notrack comment "T3"', None),
    ],
)  # fmt: skip
def test_the_label_is_a_comment_which_packets_that_only_pass_do_not_pay(
    action: RowAction, nft: str, iptables: str | None
) -> None:
    made = row(action=action, label="T3")
    assert made.nft() == nft
    assert made.iptables() == ([iptables] if iptables else [])


def test_rows_are_for_both_tools_or_for_one_and_iptables_has_a_chain_a_hook() -> None:
    rows = [
        RuleRow("", "pre", (), Ending.ACCEPT),
        RuleRow("", "pre-tcp", (), Ending.DROP, Tool.NFT),
        RuleRow("", "pre-tcp", (), Ending.RETURN, Tool.IPTABLES),
        RuleRow("", "post", (), QUEUE),
    ]
    assert nft_rules(rows) == {"pre": ["accept"], "pre-tcp": ["drop"], "post": ["goto to-worker"]}
    assert iptables_rules(rows, "pre") == ["-j ACCEPT", "-j RETURN"]
    assert iptables_rules(rows, "post") == ["-j NFQUEUE --queue-num 7"]
