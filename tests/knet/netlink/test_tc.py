"""Messages of tc: ours as iproute2 writes them, and the kernel's."""

import struct

from hypothesis import given
from hypothesis import strategies as st

from knet import netlink
from knet.netlink import Message, tc
from knet.netlink.tc import TcFilter

# What tc of iproute2 6.1 sends about the ninth link, with another sequence number, and what kernel
# 6.18 answers, without its statistics.
ADD_CLSACT = (
    "30000000 24000506 07000000 00000000 00000000 09000000 0000ffff f1ffffff 00000000"
    "0b000100 636c7361 63740000"
)
DELETE_CLSACT = (
    "30000000 25000500 07000000 00000000 00000000 09000000 0000ffff f1ffffff 00000000"
    "0b000100 636c7361 63740000"
)
ADD_FILTER = (
    "50000000 2c000506 07000000 00000000 00000000 09000000 01000000 f2ffffff 00030040"
    "08000100 62706600 24000200 08000600 06000000 0d000700 742e6f3a 5b74635d 00000000"
    "08000800 01000000"
)
DELETE_FILTER = "24000000 2d000500 07000000 00000000 00000000 09000000 00000000 f2ffffff 00000040"
GET_QDISCS = "24000000 26000103 07000000 00000000 00000000 00000000 00000000 00000000 00000000"
GET_FILTERS = "24000000 2e000103 07000000 00000000 00000000 09000000 00000000 f2ffffff 00000000"
QDISCS = (
    "38000000 24000200 07000000 a5300000 00000000 09000000 00000000 ffffffff 02000000"
    "0c000100 6e6f7175 65756500 05000c00 00000000"
    "3c000000 24000200 07000000 a5300000 00000000 09000000 0000ffff f1ffffff 01000000"
    "0b000100 636c7361 63740000 04000200 05000c00 00000000"
)
FILTERS = (
    "34000000 2c000200 07000000 ae300000 00000000 09000000 00000000 f2ffffff 00030040"
    "08000100 62706600 08000b00 00000000"
    "6c000000 2c000200 07000000 ae300000 00000000 09000000 01000000 f2ffffff 00030040"
    "08000100 62706600 08000b00 00000000 38000200 0d000700 742e6f3a 5b74635d 00000000"
    "08000b00 9f0c0000 0c000a00 f03f3c89 3109830e 08000800 01000000 08000900 08000000"
)
LINK, PRIORITY = 9, 0x4000
NAME = "t.o:[tc]"
NEW_FLAGS = struct.Struct("<6xH")
CREATE, REPLACE, EXCLUSIVE = 0x400, 0x100, 0x200


def read(text: str) -> list[Message]:
    """Both ends write little-endian here; the modules write the host's own order."""
    return list(netlink.messages(bytes.fromhex(text)))


def test_places_for_filters_are_made_and_taken_away_as_tc_does() -> None:
    assert tc.add_clsact(7, LINK) == bytes.fromhex(ADD_CLSACT)
    assert tc.delete_clsact(7, LINK) == bytes.fromhex(DELETE_CLSACT)


def test_a_filter_is_set_as_tc_does_but_in_place_of_a_former_one() -> None:
    ours = bytearray(tc.set_filter(7, LINK, tc.IN, PRIORITY, 6, NAME))
    theirs = bytearray.fromhex(ADD_FILTER)

    (found,), (added,) = NEW_FLAGS.unpack_from(ours), NEW_FLAGS.unpack_from(theirs)
    assert (found, added) == (CREATE | REPLACE | 5, CREATE | EXCLUSIVE | 5)
    assert ours[:6] + ours[8:] == theirs[:6] + theirs[8:]


def test_the_other_way_is_the_other_parent() -> None:
    one, other = (tc.set_filter(7, LINK, way, PRIORITY, 6, NAME) for way in (tc.IN, tc.OUT))

    assert [at for at in range(len(one)) if one[at] != other[at]] == [28]
    assert other[28:32] == bytes.fromhex("f3ffffff")


def test_a_filter_is_taken_away_as_tc_does() -> None:
    assert tc.delete_filter(7, LINK, tc.IN, PRIORITY) == bytes.fromhex(DELETE_FILTER)


def test_what_is_there_is_asked_for_as_tc_does() -> None:
    assert tc.get_qdiscs(7) == bytes.fromhex(GET_QDISCS)
    assert tc.get_filters(7, LINK, tc.IN) == bytes.fromhex(GET_FILTERS)


def test_links_with_places_for_filters_are_told_from_others() -> None:
    assert list(tc.clsacts(read(QDISCS))) == [LINK]
    assert list(tc.clsacts(read(FILTERS))) == []


def test_a_filter_is_told_with_its_name_and_program() -> None:
    assert list(tc.filters(read(FILTERS))) == [TcFilter(LINK, tc.IN, PRIORITY, 1, NAME, 0xC9F)]
    assert list(tc.filters(read(QDISCS))) == []


def test_filters_of_another_kind_are_none() -> None:
    other = bytes.fromhex(FILTERS.replace("62706600", "75333200"))  # u32

    assert list(tc.filters(netlink.messages(other))) == []


@given(
    st.lists(
        st.builds(
            Message,
            st.just(0),
            st.sampled_from([36, 44, 45]),
            *[st.just(0)] * 2,
            st.one_of(
                st.binary(),
                st.binary(max_size=80).map(bytes.fromhex(FILTERS)[16 + 52 : 52 + 36].__add__),
                st.tuples(st.integers(0, 91), st.integers(0, 255)).map(
                    lambda at: (
                        (body := bytes.fromhex(FILTERS)[52 + 16 :])[: at[0]]
                        + bytes(at[1:])
                        + body[at[0] + 1 :]
                    )
                ),
            ),
        )
    )
)
def test_any_bytes_will_do(messages: list[Message]) -> None:
    for each in tc.filters(messages):
        assert 0 <= each.priority < 1 << 16
        assert 0 <= each.program < 1 << 32
    assert len(list(tc.clsacts(messages))) <= len(messages)
