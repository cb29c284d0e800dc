"""Messages of the routing socket: ours as iproute2 writes them, and the kernel's."""

from hypothesis import given
from hypothesis import strategies as st

from knet import netlink
from knet.netlink import Message, rtnetlink
from knet.netlink.rtnetlink import InterfaceAddress, RouteLookup

# What kernel 6.18 answers of a host that has 192.168.0.2/24 on its third link, and what iproute2
# 6.1 asks it, but for the wish to hear of the table.
GET_ROUTE = "24000000 1a000100 07000000 00000000 02200000 00000000 00000000 08000100 c0a80001"
NEW_ROUTE = (
    "68000000 18000000 07000000 91250000 02200000 fe000001 00020000 08000f00 fe000000"
    "08000100 c0a80001 08000400 03000000 08000700 c0a80002 08001900 00000000"
    "24000c00 02000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000"
)
NEW_ADDRESS = (
    "50000000 14000200 01000000 91250000 02188000 03000000 08000100 c0a80002 08000200 c0a80002"
    "09000300 65746831 00000000 08000800 80000000 14000600 ffffffff ffffffff 0a7f0300 0a7f0300"
)


def read(text: str) -> list[Message]:
    """Both ends write little-endian here; the modules write the host's own order."""
    return list(netlink.messages(bytes.fromhex(text)))


def test_a_route_is_asked_for_as_ip_route_get_does() -> None:
    assert rtnetlink.get_route(7, bytes((192, 168, 0, 1))) == bytes.fromhex(GET_ROUTE)


def test_a_route_leads_over_a_link_from_an_address() -> None:
    assert rtnetlink.route(read(NEW_ROUTE)) == RouteLookup(3, bytes((192, 168, 0, 2)))
    assert rtnetlink.route([]) == RouteLookup(None, None)


def test_an_address_has_its_subnet_and_its_link() -> None:
    own = bytes((192, 168, 0, 2))

    assert list(rtnetlink.addresses(read(NEW_ADDRESS))) == [InterfaceAddress(own, own, 24, 3)]


def test_requests_are_whole() -> None:
    for request in (rtnetlink.get_addresses(1), rtnetlink.get_link(2, 3)):
        (message,) = netlink.messages(request)
        assert message.sequence in (1, 2)


@given(
    st.lists(st.builds(Message, st.just(0), st.integers(14, 28), *[st.just(0)] * 2, st.binary()))
)
def test_any_bytes_will_do(messages: list[Message]) -> None:
    for address in rtnetlink.addresses(messages):
        assert len(address.local) == len(address.beyond) == 4
    route = rtnetlink.route(messages)
    assert route.source is None or len(route.source) == 4
    rtnetlink.mtu(messages)
