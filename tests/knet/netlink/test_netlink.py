"""Netlink messages: as bytes, there and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet import netlink
from knet.netlink import Message

values = st.binary(max_size=20)


def test_a_message_as_the_kernel_reads_it() -> None:
    made = netlink.message(10, 12, netlink.ACK, netlink.text(1, "abc"), sequence=7, resource=1600)

    assert made.hex(" ", 4) == ("1c000000 0c0a0500 07000000 00000000 02000640 08000100 61626300")


def test_a_batch_is_framed_by_its_subsystem() -> None:
    inner = netlink.message(10, 12, 0)
    begin, middle, end = netlink.messages(netlink.batch(10, inner))

    assert (begin.kind, begin.body.hex()) == (netlink.BATCH_BEGIN, "0000000a")
    assert (middle.subsystem, middle.kind) == (10, 12)
    assert (end.kind, end.body.hex()) == (netlink.BATCH_END, "0000000a")


@given(st.lists(st.tuples(st.integers(0, 0x3FFF), values), max_size=5))
def test_attributes_are_read_as_they_were_made(wanted: list[tuple[int, bytes]]) -> None:
    made = b"".join(netlink.attribute(kind, value) for kind, value in wanted)
    inside = dict(netlink.attributes(netlink.nested(3, made)))

    assert len(made) % 4 == 0
    assert list(netlink.attributes(made)) == wanted
    assert list(netlink.attributes(inside[3])) == wanted


@given(st.lists(st.tuples(st.integers(0, 255), values), max_size=5))
def test_messages_are_read_as_they_were_made(wanted: list[tuple[int, bytes]]) -> None:
    made = [
        netlink.message(10, kind, 0, netlink.attribute(1, value), sequence=at)
        for at, (kind, value) in enumerate(wanted)
    ]
    got = list(netlink.messages(b"".join(made)))

    assert [(each.kind, each.sequence) for each in got] == [
        (kind, at) for at, (kind, _) in enumerate(wanted)
    ]
    assert [dict(netlink.attributes(each.attributes))[1] for each in got] == [
        value for _, value in wanted
    ]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (Message(0, 2, 0, 1, (-2).to_bytes(4, "little", signed=True) + bytes(16)), 2),
        (Message(0, 2, 0, 1, bytes(20)), 0),
        (Message(0, 2, 0, 1, b""), None),
        (Message(10, 2, 0, 1, bytes(20)), None),
    ],
)
def test_an_error_is_known_from_an_acknowledgement(message: Message, expected: int | None) -> None:
    assert message.error == expected


@given(st.binary(max_size=100))
def test_any_bytes_may_be_read(data: bytes) -> None:
    for message in netlink.messages(data):
        assert isinstance(message.error, int | None)
        assert all(len(value) <= len(data) for _, value in netlink.attributes(message.attributes))
