"""Messages of the routing socket: ours as iproute2 writes them, and the kernel's."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet import netlink
from knet.netlink import Message, rtnetlink
from knet.netlink.rtnetlink import HostLink, InterfaceAddress, RouteLookup

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
# As `ip link` asks, but for the wish to hear of less.
GET_LINKS = "20000000 12000103 07000000 00000000 00000000 00000000 00000000 00000000"
# Of what kernel 6.18 tells of a veth that is a port of a bridge: its name, MTU, bridge and kind.
NEW_LINK = (
    "54000000 10000200 07000000 91250000 00000100 09000000 43100100 00000000"
    "07000300 64300000 08000400 dc050000 08000a00 04000000"
    "1c001200 09000100 76657468 00000000 0b000400 62726964 67650000"
)
IFNAME, MTU = 3, 4


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


def test_links_are_asked_for_as_ip_link_does() -> None:
    assert rtnetlink.get_links(7) == bytes.fromhex(GET_LINKS)


def test_a_link_has_a_name_a_kind_and_whom_it_belongs_to() -> None:
    assert list(rtnetlink.links(read(NEW_LINK))) == [HostLink(9, "d0", 1, False, 1500, 4, "veth")]
    assert rtnetlink.mtu(read(NEW_LINK)) == 1500
    assert list(rtnetlink.links(read(NEW_ADDRESS))) == []


@pytest.mark.parametrize(("flags", "is_loopback"), [(0x8, True), (0x9, True), (0x1041, False)])
def test_loopback_is_told_by_its_flag(flags: int, is_loopback: bool) -> None:
    head = struct.pack("=BxHiII", 0, 772, 1, flags, 0)
    body = head + netlink.text(IFNAME, "lo") + netlink.attribute(MTU, struct.pack("=I", 65536))
    (found,) = rtnetlink.links([Message(0, 16, 0, 0, body)])

    assert found == HostLink(1, "lo", 772, is_loopback, 65536, 0, "")


def test_what_a_link_does_not_tell_is_nothing() -> None:
    head = struct.pack("=BxHiII", 0, 1, 3, 0, 0)
    (found,) = rtnetlink.links([Message(0, 16, 0, 0, head)])

    assert found == HostLink(3, "", 1, False, 0, 0, "")


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
    assert len(list(rtnetlink.links(messages))) <= len(messages)


@given(st.lists(st.tuples(st.integers(0, 67), st.integers(0, 255)), max_size=8))
def test_a_link_may_be_told_of_wrongly(damage: list[tuple[int, int]]) -> None:
    body = bytearray.fromhex(NEW_LINK)[16:]
    for at, byte in damage:
        body[at] = byte
    (found,) = rtnetlink.links([Message(0, 16, 0, 0, bytes(body))])

    assert all(0 <= each < 1 << 32 for each in (found.kind, found.mtu, found.master))
