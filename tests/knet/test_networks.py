"""Subnets as `ipaddress` has them, which leave nothing for the collector."""

import ipaddress
from ipaddress import IPv4Network

from hypothesis import given
from hypothesis import strategies as st

from knet.networks import collapse, network
from tests.tools.hours import garbage

lengths = st.one_of(st.integers(0, 32), st.integers(24, 32))
near = st.integers(0, 600).map(lambda number: 0x0A000000 + number)
subnets = st.builds(
    network, st.one_of(near, st.integers(0, 2**32 - 1), st.just(2**32 - 1)), lengths
)


@given(st.integers(0, 2**32 - 1), lengths)
def test_a_network_is_the_one_of_ipaddress(address: int, length: int) -> None:
    assert network(address, length) == IPv4Network((address, length), strict=False)
    assert network(address.to_bytes(4), length) == network(address, length)


@given(st.lists(subnets, max_size=12))
def test_they_collapse_as_those_of_ipaddress_do(some: list[IPv4Network]) -> None:
    assert list(collapse(some)) == list(ipaddress.collapse_addresses(some))


def test_none_of_them_is_left_for_the_collector() -> None:
    def make() -> None:
        for length in range(33):
            network(b"\x0a\0\0\2", length)
        collapse([network(0x0A000000 + number) for number in range(9)])

    assert garbage(make) == {}
    assert garbage(lambda: IPv4Network("10.0.0.2/31")) != {}  # or all this isn't needed any more
