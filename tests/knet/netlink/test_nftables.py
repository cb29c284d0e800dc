"""Messages to nf_tables: bytes laid out by hand from its headers, and answers a kernel gave."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet import netlink
from knet.netlink import nftables
from knet.netlink.nftables import Count

ANSWER = (
    "02000000 0b000100 6b72656c 61790000 0c000200 7564702d 75313200 08000300 00000001 "
    "1c000480 0c000100 00000000 000000ff 0c000200 00000000 00000002 08000500 00000001"
)
"""NFTA_OBJ_TABLE, _NAME, _TYPE, _DATA with bytes and packets, _USE."""


def words(text: str) -> bytes:
    return bytes.fromhex(text)


def head(kind: int, flags: int, sequence: int, *rest: str) -> bytes:
    """A request as netlink heads it: of nf_tables, for IPv4."""
    body = words("02000000" + "".join(rest))
    fields = ((16 + len(body), 4), (kind, 1), (10, 1), (flags, 2), (sequence, 4), (0, 4))
    return b"".join(value.to_bytes(size, "little") for value, size in fields) + body


def answer(body: bytes, kind: int = nftables.NEW_ELEMENT) -> netlink.Message:
    return netlink.Message(10, kind, 0, 1, body)


def test_a_learnt_query_is_asked_for() -> None:
    """In the key each field takes four bytes."""
    made = nftables.get_learnt("krelay", "learnt-0", bytes((10, 0, 0, 1)), (4000).to_bytes(2), 9)

    names = "0b000100 6b72656c 61790000 0d000200 6c656172 6e742d30 00000000"
    key = "18000380 14000180 10000180 0c000100 0a000001 0fa00000"
    assert made == head(13, 0x1, 9, names, key)


def test_all_counters_of_a_table_are_asked_for() -> None:
    """NFTA_OBJ_TYPE is NFT_OBJECT_COUNTER."""
    made = nftables.get_counters("krelay")

    assert made == head(19, 0x301, 0, "0b000100 6b72656c 61790000 08000300 00000001")


def test_a_rule_that_queues_by_a_target_of_iptables() -> None:
    made = nftables.queue_rule("krelay", "to-worker", 1600)

    assert made == head(
        6, 0x405, 0,
        "0b000100 6b72656c 61790000 0e000200 746f2d77 6f726b65 72000000 34000480 30000180",
        "0b000100 74617267 65740000 20000280 0c000100 4e465155 45554500 08000200 00000000",
        "06000300 40060000",
    )  # fmt: skip


def test_a_rule_that_asks_a_program_marks_and_accepts() -> None:
    """`match` with struct xt_bpf_info_v1: its mode XT_BPF_MODE_FD_PINNED, which says a descriptor;
    `meta` and `bitwise` of its mark, by NFT_REG_1; `immediate` with NF_ACCEPT."""
    made = nftables.program_rule("krelay", "offloaded", 7, 0x10000000)

    assert made == head(
        6, 0x405, 0,
        "0b000100 6b72656c 61790000 0e000200 6f66666c 6f616465 64000000 f8020480",
        "38020180 0a000100 6d617463 68000000 28020280 08000100 62706600 08000200 00000001",
        "14020300 02000000 07000000", "00" * 520,
        "24000180 09000100 6d657461 00000000 14000280 08000100 00000001 08000200 00000003",
        "44000180 0c000100 62697477 69736500 34000280",
        "08000100 00000001 08000200 00000001 08000300 00000004",
        "0c000480 08000100 ffffffef 0c000580 08000100 00000010",
        "24000180 09000100 6d657461 00000000 14000280 08000300 00000001 08000200 00000003",
        "30000180 0e000100 696d6d65 64696174 65000000 1c000280",
        "08000100 00000000 10000280 0c000280 08000100 00000001",
    )  # fmt: skip


def test_all_rules_of_a_chain_are_taken_out() -> None:
    made = nftables.delete_rules("krelay", "offloaded")

    names = "0b000100 6b72656c 61790000 0e000200 6f66666c 6f616465 64000000"
    assert made == head(8, 0x5, 0, names)


def test_a_chain_is_asked_for_and_a_table_taken_out() -> None:
    name = "0b000100 6b72656c 61790000"

    assert nftables.get_chain("krelay", "pre") == head(4, 0x5, 0, name, "08000300 70726500")
    assert nftables.delete_table("krelay") == head(2, 0x5, 0, name)


def test_the_queue_of_nf_tables_is_tried_in_a_table_that_goes() -> None:
    """NFTA_QUEUE_NUM is the one attribute that its rule must have."""
    name = "0b000100 6b72656c 61790000"
    rule = "20000480 1c000180 0a000100 71756575 65000000 0c000280 06000100 00000000"

    assert nftables.own_queue("krelay") == (
        head(0, 0x405, 0, name),
        head(3, 0x405, 0, name, "08000300 74727900"),
        head(6, 0x405, 0, name, "08000200 74727900", rule),
        head(2, 0x5, 0, name),
    )


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_is_one_of_nf_tables(count: int) -> None:
    requests = [nftables.get_learnt("krelay", "one", bytes(4), bytes(2), n) for n in range(count)]
    begin, *inside, end = netlink.messages(nftables.joined(requests))

    assert [(each.kind, each.body) for each in (begin, end)] == [
        (16, words("0000000a")), (17, words("0000000a"))
    ]  # fmt: skip
    assert [each.sequence for each in inside] == list(range(count))


def test_a_named_counter_is_read() -> None:
    body = words(ANSWER)

    assert nftables.named_counter(answer(body, nftables.NEW_OBJECT)) == ("udp-u12", Count(2, 255))
    assert nftables.named_counter(answer(body, nftables.NEW_ELEMENT)) is None
    assert nftables.named_counter(answer(body[:24], nftables.NEW_OBJECT)) is None


def mutilated(data: st.DataObject) -> bytes:
    """The answer with any byte changed, or cut."""
    body = bytearray(words(ANSWER))
    for _ in range(data.draw(st.integers(0, 4))):
        body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    return bytes(body[: data.draw(st.integers(0, len(body)))])


@given(st.data(), st.binary(max_size=80), st.sampled_from((12, 14, 18)))
def test_any_bytes_give_a_count_or_none(data: st.DataObject, other: bytes, kind: int) -> None:
    for body in (mutilated(data), other):
        named = nftables.named_counter(answer(body, kind))
        assert named is None or isinstance(named[1], Count)
