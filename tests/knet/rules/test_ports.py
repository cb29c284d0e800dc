"""Ranges of ports."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.rules.ports import Ports, merged

port_ranges = st.lists(
    st.tuples(st.integers(1, 400), st.integers(0, 30)).map(lambda r: (r[0], r[0] + r[1])),
    max_size=60,
)


@given(port_ranges)
def test_merged_ranges_are_the_same_ports_in_order_and_apart(
    ranges: list[tuple[int, int]],
) -> None:
    result = merged(ranges)

    assert {p for low, high in result for p in range(low, high + 1)} == {
        p for low, high in ranges for p in range(low, high + 1)
    }
    assert all(low <= high for low, high in result)
    assert all(before[1] + 1 < after[0] for before, after in pairwise(result))
    assert merged(result) == result
    assert merged(reversed(ranges)) == result


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        ([], ()),
        ([(80, 80)], ((80, 80),)),
        ([(80, 80), (81, 81)], ((80, 81),)),
        ([(80, 80), (82, 82)], ((80, 80), (82, 82))),
        ([(1, 65535), (80, 80)], ((1, 65535),)),
        ([(80, 90), (85, 87), (90, 95)], ((80, 95),)),
    ],
)
def test_touching_ranges_become_one(ranges: list[tuple[int, int]], expected: Ports) -> None:
    assert merged(ranges) == expected
