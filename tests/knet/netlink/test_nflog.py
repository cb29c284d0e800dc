"""Copies of packets' heads: three ways to read them, of which the slow one is what is right."""

import struct
import sys
from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet import netlink
from knet.netlink import nflog
from knet.netlink.nflog import Copy, Reader

PREROUTING, POSTROUTING = 0, 4
DONE = struct.pack("=IHHIIi", 20, netlink.DONE, 0, 0, 0, 0)
REFUSED = struct.pack("=IHHIIi", 20, netlink.ERROR, 0, 0, 0, -1)

PREFIX, MARK, INDEV, OUTDEV, HWADDR, HWTYPE, HWHEADER, HWLEN = 10, 2, 4, 5, 8, 15, 16, 17
TIMESTAMP = 3
LINK = ((HWADDR, 12), (HWTYPE, 2), (HWLEN, 2), (HWHEADER, 14))
FORWARDED = {
    PREROUTING: ((PREFIX, 1), (INDEV, 4), *LINK, (TIMESTAMP, 16)),
    POSTROUTING: ((PREFIX, 1), (INDEV, 4), (OUTDEV, 4), *LINK),
}
"""Type and bytes of each attribute of a copy, for a packet that was forwarded, as seen."""

CAPTURED = bytes.fromhex(
    "9400000000040000000000000000000002000007080001000800000005000a00000000000800040000000002"
    "1000080000060000aa60f9230379000006000f000001000006001100000e00001200100076cef3c6d3a0aa60"
    "f92303790800000014000300000000006b02d071000000000000e0be2000090045000021e172400040118eaf"
    "0a000001c0a80001e0b21388000dcac8"
)


def message(*attributes: tuple[int, bytes], kind: int = nflog.PACKET, subsystem: int = 4) -> bytes:
    joined = b"".join(netlink.attribute(*each) for each in attributes)
    return netlink.message(subsystem, kind, 0, joined, resource=7)


def copied(hook: int, head: bytes, others: Iterable[tuple[int, bytes]]) -> bytes:
    """The kernel's message."""
    return message((1, bytes((8, 0, hook, 0))), *others, (9, head))


def forwarded(hook: int, rng: Random, first: int = 0x45) -> bytes:
    """The kernel's message about a packet that was forwarded, with any values."""
    others = [(kind, rng.randbytes(size)) for kind, size in FORWARDED[hook]]
    return copied(hook, bytes((first,)) + rng.randbytes(27), others)


def slowly(data: bytes) -> list[Copy]:
    """The twin: each message by its attributes."""
    return [copy for each in netlink.messages(data) if (copy := nflog.read(each)) is not None]


def test_a_copy_as_the_kernel_makes_it() -> None:
    head = CAPTURED[-28:]

    assert slowly(CAPTURED + DONE) == [(PREROUTING, head)]
    assert Reader().copies(CAPTURED + DONE) == [(PREROUTING, head)]


def test_the_settings_as_the_kernel_reads_them() -> None:
    assert nflog.settings(7, 1).hex(" ", 4) == (
        "40000000 01040500 01000000 00000000 00000007 05000100 01000000 0a000200 0000001c 02000000 "
        "08000300 0000fe00 08000400 00000001 08000500 000000c8"
    )


def test_room_is_enough_for_all_that_come_together() -> None:
    assert nflog.TOGETHER * len(forwarded(PREROUTING, Random(1))) * 2 < nflog.ROOM


values = st.binary(max_size=9)
heads = st.one_of(
    st.binary(min_size=27, max_size=27).map(b"\x45".__add__),
    st.binary(min_size=26, max_size=30),
    st.binary(min_size=30, max_size=34).map(b"\x45".__add__),
)
others = st.lists(st.tuples(st.integers(0, 17), values), max_size=3)
usual = st.builds(
    forwarded,
    st.sampled_from((PREROUTING, POSTROUTING)),
    st.randoms(use_true_random=False),
    st.sampled_from((0x45, 0x45, 0x45, 0x46)),
)
unusual = st.one_of(
    st.builds(copied, st.integers(0, 255), heads, others),
    st.builds(lambda attributes: message(*attributes), others),
    st.builds(lambda head, after: message((1, bytes(4)), (9, head), *after), heads, others),
    st.builds(lambda head: message((1, bytes(2)), (9, head)), heads),
    st.builds(
        lambda kind, head: message((1, bytes(4)), (9, head), kind=kind), st.integers(0, 3), heads
    ),
    st.sampled_from((DONE, REFUSED)),
    st.binary(max_size=24),
)  # fmt: skip
received = st.one_of(
    st.lists(usual, max_size=6), st.lists(st.one_of(usual, usual, unusual), max_size=8)
).map(b"".join)


@given(st.lists(received, min_size=1, max_size=4))
def test_what_was_learnt_changes_nothing_in_what_is_read(readings: list[bytes]) -> None:
    reader = Reader()

    for data in (*readings, *readings):
        assert reader.copies(data) == slowly(data)


@given(st.lists(usual, min_size=1, max_size=5), st.data())
def test_any_changed_byte_and_any_cut_read_as_they_do_slowly(
    messages: list[bytes], data: st.DataObject
) -> None:
    reader = Reader()
    whole = b"".join(messages)
    assert reader.copies(whole) == slowly(whole)
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = whole[:at] + data.draw(st.binary(min_size=1, max_size=1)) + whole[at + 1 :]
    cut = whole[data.draw(st.integers(0, 12)) : at]

    for each in (changed, cut, whole):
        assert reader.copies(each) == slowly(each)


@given(st.binary(max_size=200))
def test_any_bytes_may_be_read(data: bytes) -> None:
    reader = Reader()
    reader.copies(CAPTURED)

    assert reader.copies(data) == slowly(data)


def test_each_byte_changed_reads_as_it_does_slowly() -> None:
    whole = CAPTURED
    reader = Reader()
    reader.copies(whole)

    for at in range(len(whole)):
        for bits in (0x01, 0x04, 0x80):
            changed = whole[:at] + bytes((whole[at] ^ bits,)) + whole[at + 1 :]
            for data in (changed, whole + changed, whole + changed + whole + DONE):
                assert reader.copies(data) == slowly(data), at


ABOUT, HEAD = (1, bytes((8, 0, POSTROUTING, 0))), (9, b"\x45" + bytes(range(27)))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        pytest.param(message((MARK, bytes(4)), ABOUT, HEAD), 1, id="hook not first"),
        pytest.param(message((1, bytes(4)), ABOUT, HEAD), 1, id="hook twice"),
        pytest.param(message(ABOUT, (9, bytes(28)), HEAD), 1, id="payload twice"),
        pytest.param(message(ABOUT, HEAD, (MARK, bytes(4))), 1, id="payload not last"),
        pytest.param(
            message((1, bytes((8, 0, POSTROUTING, 0, 0, 0, 0, 0))), HEAD), 1, id="long header"
        ),
        pytest.param(message(ABOUT, (9, HEAD[1] + b"more")), 1, id="long payload"),
        pytest.param(message(ABOUT, (9, HEAD[1][:27])), 0, id="short payload"),
        pytest.param(message((1, bytes(3)), HEAD), 0, id="short header"),
        pytest.param(message(ABOUT), 0, id="no payload"),
        pytest.param(message(HEAD), 0, id="no header"),
        pytest.param(message(), 0, id="nothing"),
        pytest.param(message(ABOUT, HEAD, kind=nflog.CONFIG), 0, id="of another kind"),
        pytest.param(message(ABOUT, HEAD, subsystem=3), 0, id="of another subsystem"),
    ],
)
def test_what_the_kernel_never_laid_out_so_is_read_all_the_same(data: bytes, expected: int) -> None:
    reader = Reader()
    wanted = [(POSTROUTING, HEAD[1])] * expected

    assert reader.copies(data) == wanted
    assert reader.copies(data * 3) == wanted * 3
    assert reader.copies(data + CAPTURED + data) == wanted + slowly(CAPTURED) + wanted


@pytest.mark.parametrize("more", [1, 2, 3, 4, 8, 32])
def test_bytes_that_are_no_attribute_end_a_message_and_not_the_reading(more: int) -> None:
    made = message(ABOUT, HEAD) + bytes(more)
    padded = len(made).to_bytes(4, sys.byteorder) + made[4:] + bytes(-more % 4)
    reader = Reader()

    assert reader.copies(padded * 3) == [(POSTROUTING, HEAD[1])] * 3
    assert reader.copies(padded * 3) == [(POSTROUTING, HEAD[1])] * 3


def test_layouts_of_the_same_length_are_told_apart() -> None:
    rng = Random(1)
    head = b"\x45" + bytes(27)
    one = copied(PREROUTING, head, [(MARK, rng.randbytes(4)), (TIMESTAMP, rng.randbytes(16))])
    two = copied(PREROUTING, head, [(TIMESTAMP, rng.randbytes(16)), (MARK, rng.randbytes(4))])
    # To whom looks where the payload is in `one` alone, this one has another.
    three = copied(PREROUTING, head, [(TIMESTAMP, rng.randbytes(24))])
    reader = Reader()

    assert len(one) == len(two) == len(three)
    for data in (one * 3, two * 3, one + two + three + one, three * 3):
        assert reader.copies(data) == slowly(data) == reader.copies(data)


def test_usual_messages_are_read_without_their_attributes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = Random(1)
    reader = Reader()
    both = (PREROUTING, POSTROUTING)
    reader.copies(b"".join(forwarded(hook, rng) for hook in both))

    for hooks in ([PREROUTING] * 50, [POSTROUTING] * 50, [rng.choice(both) for _ in range(50)]):
        data = b"".join(forwarded(hook, rng) for hook in hooks) + DONE
        with monkeypatch.context() as patched:
            patched.setattr(nflog, "read", lambda message: None)
            got = reader.copies(data)
        assert got == slowly(data)
        assert [hook for hook, _ in got] == hooks


def test_layouts_are_learnt_up_to_a_number() -> None:
    reader = Reader()
    messages = [
        copied(PREROUTING, b"\x45" + bytes(27), [(MARK, bytes(size))])
        for size in range(nflog.MOST_LAYOUTS * 8)
    ]
    data = b"".join(messages) + DONE

    assert reader.copies(data) == slowly(data)
    assert reader.layouts == nflog.MOST_LAYOUTS
