"""Messages to nf_tables: bytes laid out by hand from its headers, and answers a kernel gave."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet import netlink
from knet.endpoint import flow_key
from knet.netlink import nftables
from knet.netlink.nftables import Count, Elements
from tests.tools.packets import at

KEY = flow_key(at("C:4000"), at("K:53"))
"""10.0.0.1:4000 > 192.168.0.2:53"""
TABLE_AND_SET = "0b000100 6b72656c 61790000 0c000200 7564702d 75313200"
"""NFTA_SET_ELEM_LIST_TABLE "krelay", NFTA_SET_ELEM_LIST_SET "udp-u12"."""
ELEMENT_KEY = "18000180 14000100 0a000001 0fa00000 c0a80002 00350000"
"""NFTA_SET_ELEM_KEY, in it NFTA_DATA_VALUE: each field of the key takes four bytes."""
ANSWER = (
    "02000004 0b000100 6b72656c 61790000 0c000200 7564702d 75313200 58000300 54000100 18000100 "
    "14000100 0a000001 0fa00000 c0a80002 00350000 0c000200 08000100 c0a80001 2c000700 0c000100 "
    "636f756e 74657200 1c000200 0c000100 00000000 00012345 0c000200 00000000 00000007"
)
"""What Linux 6.18 answered to GET_ELEMENT, but for its zero counts; the head of netlink apart."""


def words(text: str) -> bytes:
    return bytes.fromhex(text)


def head(kind: int, flags: int, sequence: int, *rest: str) -> bytes:
    """A request as netlink heads it: of nf_tables, for IPv4."""
    body = words("02000000" + "".join(rest))
    fields = ((16 + len(body), 4), (kind, 1), (10, 1), (flags, 2), (sequence, 4), (0, 4))
    return b"".join(value.to_bytes(size, "little") for value, size in fields) + body


def answer(body: bytes, kind: int = nftables.NEW_ELEMENT) -> netlink.Message:
    return netlink.Message(10, kind, 0, 1, body)


def test_an_address_is_put_into_a_map() -> None:
    value = "0c000280 08000100 c0a80001"
    made = Elements("krelay", "udp-u12").add([(KEY, at("S:0").addr)], 7)

    assert made == head(
        12, 0x401, 7, TABLE_AND_SET, "2c000380 28000180", ELEMENT_KEY, value
    )  # NLM_F_REQUEST, NLM_F_CREATE and not NLM_F_REPLACE


def test_a_port_is_put_into_a_map_and_padded() -> None:
    names = "0b000100 6b72656c 61790000 0b000200 7463702d 74310000"
    made = Elements("krelay", "tcp-t1").add([(KEY, (16000).to_bytes(2))], 1)

    value = "0c000280 06000100 3e800000"
    assert made == head(12, 0x401, 1, names, "2c000380 28000180", ELEMENT_KEY, value)


@pytest.mark.parametrize(("tell", "flags"), [(False, 0x1), (True, 0x9)])
def test_an_element_is_taken_out_and_perhaps_told_of(tell: bool, flags: int) -> None:
    made = Elements("krelay", "udp-u12").delete([KEY], 8, tell=tell)

    assert made == head(14, flags, 8, TABLE_AND_SET, "20000380 1c000180", ELEMENT_KEY)


def test_many_elements_are_put_in_and_taken_out_by_one_request() -> None:
    elements = Elements("krelay", "udp-u12")
    value = "0c000280 06000100 3e800000"
    added = elements.add([(KEY, (16000).to_bytes(2))] * 2, 1)
    taken = elements.delete([KEY] * 3, 2)
    put = elements.put([KEY] * 2, 3)

    one, bare = ("28000180", ELEMENT_KEY, value), ("1c000180", ELEMENT_KEY)
    assert added == head(12, 0x401, 1, TABLE_AND_SET, "54000380", *one * 2)
    assert taken == head(14, 0x1, 2, TABLE_AND_SET, "58000380", *bare * 3)
    assert put == head(12, 0x401, 3, TABLE_AND_SET, "3c000380", *bare * 2)


def test_elements_are_asked_for() -> None:
    one = Elements("krelay", "udp-u12").get([KEY], 9)
    two = Elements("krelay", "udp-u12").get([KEY, KEY], 9)

    element = "1c000180", ELEMENT_KEY
    assert one == head(13, 0x1, 9, TABLE_AND_SET, "20000380", *element)
    assert two == head(13, 0x1, 9, TABLE_AND_SET, "3c000380", *element, *element)


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
    requests = [Elements("krelay", "udp-u12").delete([KEY], n) for n in range(count)]
    begin, *inside, end = netlink.messages(nftables.joined(requests))

    assert [(each.kind, each.body) for each in (begin, end)] == [
        (16, words("0000000a")), (17, words("0000000a"))
    ]  # fmt: skip
    assert [each.sequence for each in inside] == list(range(count))


def test_the_count_of_an_element_is_read() -> None:
    assert nftables.element_count(answer(words(ANSWER))) == Count(7, 0x12345)
    gone = answer(words(ANSWER), nftables.DELETE_ELEMENT)
    assert nftables.element_count(gone) == Count(7, 0x12345)


@pytest.mark.parametrize(
    ("usual", "other"), [("1c000200", "1c000280"), ("0c000200 00000000", "0c000280 00000000")]
)
def test_a_count_that_is_written_in_another_way_is_read_as_well(usual: str, other: str) -> None:
    """Attributes may be marked as nested, or not."""
    body = ANSWER.replace(usual, other)

    assert body != ANSWER
    assert nftables.element_count(answer(words(body))) == Count(7, 0x12345)


def test_the_count_is_found_among_several_expressions() -> None:
    """A kernel that has more than one for an element gives a list of them."""
    count = netlink.nested(
        2, netlink.attribute(1, (99).to_bytes(8)), netlink.attribute(2, (3).to_bytes(8))
    )
    others = netlink.nested(1, netlink.text(1, "last"), netlink.nested(2))
    counter = netlink.nested(1, netlink.text(1, "counter"), count)
    element = netlink.nested(1, netlink.nested(11, others, counter))
    body = bytes(4) + netlink.text(1, "krelay") + netlink.nested(3, element)

    assert nftables.element_count(answer(body)) == Count(3, 99)


@pytest.mark.parametrize(
    "body",
    [
        "",
        "02000000 0b000100 6b72656c 61790000",
        "02000000 08000300 04000100",
        ANSWER.replace("636f756e 74657200", "6c617374 00000000"),
    ],
    ids=["nothing", "no element", "an empty one", "another expression"],
)
def test_what_shows_no_count_is_none(body: str) -> None:
    assert nftables.element_count(answer(words(body))) is None


def test_a_named_counter_is_read() -> None:
    """NFTA_OBJ_TABLE, _NAME, _TYPE, _DATA with bytes and packets, _USE."""
    body = words(
        "02000000 0b000100 6b72656c 61790000 0c000200 7564702d 75313200 08000300 00000001 "
        "1c000480 0c000100 00000000 000000ff 0c000200 00000000 00000002 08000500 00000001"
    )

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
        count = nftables.element_count(answer(body, kind))
        named = nftables.named_counter(answer(body, kind))
        assert count is None or isinstance(count, Count)
        assert named is None or isinstance(named[1], Count)


@pytest.mark.parametrize("value", [(16000).to_bytes(2), at("K:0").addr])
def test_a_key_with_a_dscp_has_one_field_more(value: bytes) -> None:
    elements = Elements("krelay", "tcp-t1")
    plain, marked = (elements.add([(key, value)]) for key in (KEY, KEY + bytes((46,))))
    assert len(marked) == len(plain) + 4
    parts = dict(netlink.attributes(marked[20:]))
    (element,) = (each for _, each in netlink.attributes(parts[3]))
    key, data = (dict(netlink.attributes(each)) for _, each in netlink.attributes(element))
    assert key[1][:16] == KEY[:4] + KEY[8:10] + bytes(2) + KEY[4:8] + KEY[10:] + bytes(2)
    assert key[1][16:] == bytes((46, 0, 0, 0))
    assert data[1] == value
    for request in (elements.get, elements.delete, elements.put):
        assert len(request([KEY + b"\x2e"])) == len(request([KEY])) + 4
