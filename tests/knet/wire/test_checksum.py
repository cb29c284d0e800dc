"""The Internet checksum against a loop over words, and its update against computing it anew."""

from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.wire.checksum import checksum, difference, updated
from tests.tools.packets import slow_checksum
from tests.tools.strategies import CORNER_WORDS, words

PATTERNS = {"zeros": b"\0", "ones": b"\xff", "twin zeros": b"\xff\xff\0\0", "counting": b"\x01\x02"}


def slow_update(field: int, old: int, new: int) -> int:
    """RFC 1624, equation 3, to the letter: HC' = ~(~HC + ~m + m')."""
    total = (~field & 0xFFFF) + (~old & 0xFFFF) + new
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def word(number: int) -> bytes:
    return number.to_bytes(2)


def test_the_example_of_rfc_1071_section_3() -> None:
    assert checksum(bytes.fromhex("0001 f203 f4f5 f6f7")) == 0xFFFF - 0xDDF2


def test_the_example_of_rfc_1624_section_4() -> None:
    assert updated(0xDD2F, difference(word(0x5555), word(0x3285))) == 0x0000


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_every_length_is_summed_as_the_loop_sums_it(pattern: bytes) -> None:
    for length in range(301):
        data = (pattern * 301)[:length]

        assert checksum(data) == slow_checksum(data), length


def test_random_bytes_of_every_length_are_summed_as_the_loop_sums_them() -> None:
    rng = Random(1071)
    for length in range(301):
        data = rng.randbytes(length)

        assert checksum(data) == slow_checksum(data), data.hex()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("", 0xFFFF),
        ("00", 0xFFFF),
        ("0000 0000", 0xFFFF),
        ("ffff", 0x0000),
        ("ffff ffff ffff", 0x0000),
        ("fffe 0001", 0x0000),
        ("ff", 0x00FF),
    ],
)
def test_only_nothing_but_zeros_has_the_checksum_ffff(data: str, expected: int) -> None:
    assert checksum(bytes.fromhex(data)) == expected


@given(data=st.binary(max_size=100))
def test_data_with_its_checksum_sums_to_zero(data: bytes) -> None:
    data += b"\0" * (len(data) % 2)

    assert checksum(data + word(checksum(data))) == 0


def test_an_update_is_equation_3_for_all_corners() -> None:
    for field, old, new in product(CORNER_WORDS, repeat=3):
        got = updated(field, difference(word(old), word(new)))

        # Where the equation gives FFFF, a sum of zero, we give its twin: no packet sums to zero.
        assert got == slow_update(field, old, new) % 0xFFFF, (field, old, new)


@given(field=words, old=words, new=words)
def test_an_update_is_equation_3(field: int, old: int, new: int) -> None:
    assert updated(field, difference(word(old), word(new))) == slow_update(field, old, new) % 0xFFFF


@given(
    rest=st.binary(min_size=1, max_size=40).filter(any),
    old=st.lists(words, max_size=6),
    new=st.lists(words, min_size=6, max_size=6),
    to_zero=st.sampled_from((None, "before", "after")),
)
def test_updating_is_the_same_as_summing_anew(
    rest: bytes, old: list[int], new: list[int], to_zero: str | None
) -> None:
    before = b"".join(map(word, old))
    after = b"".join(map(word, new[: len(old)]))
    if to_zero:  # a word more, so that the checksum comes out as zero on one side of the change
        tail = rest + b"\0" * (len(rest) % 2)
        rest = tail + word(slow_checksum((before if to_zero == "before" else after) + tail))

    field = updated(checksum(before + rest), difference(before, after))

    assert field == checksum(after + rest)


@given(field=words, delta=st.integers(0, 0xFFFE))
def test_a_wrong_field_stays_wrong_by_as_much(field: int, delta: int) -> None:
    right, wrong = 0x1234, field

    assert (updated(wrong, delta) - updated(right, delta)) % 0xFFFF == (wrong - right) % 0xFFFF
