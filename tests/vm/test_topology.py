"""Networks as data: what is derived, what is refused, what is drawn."""

from ipaddress import ip_address, ip_interface

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krelay_vm.topology import (
    DEFAULT,
    Host,
    Link,
    Route,
    Segment,
    Topology,
    TopologyError,
    draw,
    relay_topology,
)
from krelay_vm.topologyfile import parse

A, B, C = Host("a"), Host("b"), Host("c")
CABLE = Link("a 10.0.0.1/24", "b 10.0.0.2/24")


def test_default_is_client_relay_server() -> None:
    ends = [(end.host, end.name, end.address) for wire in DEFAULT.wires for end in wire.ends]

    assert ends == [
        ("client", "eth0", "10.0.0.1"),
        ("relay", "eth0", "10.0.0.254"),
        ("relay", "eth1", "192.168.0.2"),
        ("server", "eth0", "192.168.0.1"),
    ]
    assert DEFAULT.routes("client") == (Route("0.0.0.0/0", "10.0.0.254"),)
    assert DEFAULT.routes("relay") == ()
    assert DEFAULT.routes("server") == (Route("0.0.0.0/0", "192.168.0.2"),)


def test_only_a_host_that_forwards_gets_forwarding() -> None:
    assert DEFAULT.sysctls("relay")["net.ipv4.ip_forward"] == "1"
    assert "net.ipv4.ip_forward" not in DEFAULT.sysctls("client")


def test_hosts_without_ipv6_addresses_stay_silent_in_ipv6() -> None:
    six = Topology((A, B), (Link("a 10.0.0.1/24 fd00::1/64", "b 10.0.0.2/24 fd00::2/64"),))
    silent = "net.ipv6.conf.default.disable_ipv6"

    assert DEFAULT.sysctls("client")[silent] == "1"
    assert silent not in six.sysctls("a")


def test_a_hosts_own_settings_win() -> None:
    topology = relay_topology(
        sysctls={"net.ipv4.ip_forward": 0, "net.ipv4.conf.all.rp_filter": "2"}
    )

    assert topology.sysctls("relay")["net.ipv4.ip_forward"] == "0"
    assert topology.sysctls("relay")["net.ipv4.conf.all.rp_filter"] == "2"


def test_interface_towards_a_host_is_the_one_on_the_shared_wire() -> None:
    assert DEFAULT.interface("relay", towards="client").name == "eth0"
    assert DEFAULT.interface("relay", towards="server").name == "eth1"
    with pytest.raises(TopologyError, match="client has no link to server"):
        DEFAULT.interface("client", towards="server")
    with pytest.raises(TopologyError, match="no host 'nobody'; there are client, relay, server"):
        DEFAULT.interface("nobody")


def test_two_gateways_make_a_route_for_each_family() -> None:
    topology = Topology(
        (Host("a", gateway="10.0.0.2 fd00::2"), B),
        (Link("a 10.0.0.1/24 fd00::1/64", "b 10.0.0.2/24 fd00::2/64"),),
    )

    assert topology.routes("a") == (Route("0.0.0.0/0", "10.0.0.2"), Route("::/0", "fd00::2"))


@pytest.mark.parametrize("member", ["a .1", "a 192.168.0.1", "a 192.168.0.1/24"])
def test_a_segments_member_may_be_written_short(member: str) -> None:
    topology = Topology((A, B), (Segment("192.168.0.0/24", member, "b .2", mtu=1400),))
    (wire,) = topology.wires

    assert wire.switched
    assert wire.ends[0].addresses == (ip_interface("192.168.0.1/24"),)
    assert {end.mtu for end in wire.ends} == {1400}


def test_a_short_member_fills_the_last_octets() -> None:
    topology = Topology((A, B), (Segment("10.1.0.0/16", "a .7.1", "b .2"),))

    assert [end.address for end in topology.wires[0].ends] == ["10.1.7.1", "10.1.0.2"]


@pytest.mark.parametrize(
    ("hosts", "links", "complaint"),
    [
        ((A,), (CABLE,), "no host 'b'; there are a"),
        ((), (CABLE,), "no host 'a'; there are none"),
        ((A, A), (), "host name 'a' is taken"),
        ((Host("switch"),), (), "host name 'switch' is taken"),
        ((Host("Client"),), (), "'Client' is not a host name"),
        ((Host("a" * 13),), (), "'aaaaaaaaaaaaa' is not a host name"),
        ((Host(""),), (), "'' is not a host name"),
        ((A, B), (Link("", "b 10.0.0.2/24"),), "'' has no address; write"),
        ((A, B), (Link("a", "b 10.0.0.2/24"),), "'a' has no address; write"),
        ((A, B), (Link("a 10.0.0.1", "b 10.0.0.2/24"),), "10.0.0.1 has no prefix length"),
        ((A, B), (Link("a 10.0.0.300/24", "b 10.0.0.2/24"),), "'a 10.0.0.300/24': '10.0.0.300/24'"),
        ((A, B), (Link("a 10.0.0.1/24", "b 10.0.1.2/24"),), "share a link but not a subnet"),
        ((A, B), (Link("a 10.0.0.1/24", "b 10.0.0.2/16"),), "share a link but not a subnet"),
        ((A, B), (Link("a 10.0.0.1/24", "b 10.0.0.1/24"),), "a and b have the same address 10.0."),
        ((A, B), (Link("a 10.0.0.1/24", "a 10.0.0.2/24"),), "a is on the link 10.0.0.0/24 twice"),
        ((A, B), (Link("a 10.0.0.0/24", "b 10.0.0.2/24"),), "not the address of one host"),
        ((A, B), (Link("a 10.0.0.255/24", "b 10.0.0.2/24"),), "not the address of one host"),
        ((A, B), (Link("a 224.0.0.1/24", "b 224.0.0.2/24"),), "not the address of one host"),
        ((A, B), (Link("a 10.0.0.1/24", "b 10.0.0.2/24", mtu=67),), "mtu 67 is not in 68-65535"),
        ((A, B, C), (CABLE, Link("a 10.0.0.5/16", "c 10.0.0.6/16")), "they overlap"),
        ((A,), (Segment("10.0.0.0/24", "a .1"),), "a segment needs two members"),
        ((A, B), (Segment("10.0.0.0/24", "a .1", "b 10.0.1.2"),), "10.0.1.2/24 is not in segment"),
        ((A, B), (Segment("10.0.0.1/24", "a .1", "b .2"),), "has host bits set"),
        ((A, B), (Segment("10.0.0.0/24", "a .1", "b .x"),), "segment 10.0.0.0/24: "),
        ((Host("a", gateway="10.0.9.9"), B), (CABLE,), "gateway 10.0.9.9 is in none of its subn"),
        ((Host("a", gateway="10.0.0.1"), B), (CABLE,), "gateway 10.0.0.1 is its own address"),
        ((Host("a", gateway="b"), B), (CABLE,), "a's gateway 'b' is not an address"),
        ((Host("a", gateway="10.0.0.2 10.0.0.3"), B), (CABLE,), "two gateways of one family"),
        ((Host("a", sysctls={"vm.swappiness": 1}), B), (), "'vm.swappiness' is not a setting of a"),
        ((Host("a", sysctls={"net.../kernel": 1}), B), (), "is not a setting of a network"),
    ],
)
def test_a_network_that_cant_be_built_is_refused_with_the_reason(
    hosts: tuple[Host, ...], links: tuple[Link | Segment, ...], complaint: str
) -> None:
    with pytest.raises(TopologyError) as refused:
        Topology(hosts, links)

    assert complaint in str(refused.value)


def test_two_point_subnets_may_use_both_addresses() -> None:
    Topology((A, B), (Link("a 10.0.0.0/31", "b 10.0.0.1/31"),))


COUNTS = st.integers(1, 9)
LENGTHS = st.integers(16, 27)


@given(COUNTS, COUNTS, st.integers(0, 9), LENGTHS, LENGTHS)
def test_every_relay_topology_has_the_relay_as_gateway_of_all(
    clients: int, servers: int, neighbours: int, near: int, far: int
) -> None:
    topology = relay_topology(
        f"10.32.0.0/{near}",
        f"172.16.0.0/{far}",
        clients=clients,
        servers=servers,
        neighbours=neighbours,
    )
    relay = {end.address for end in topology.interfaces("relay")}
    others = [name for name in topology.names if name != "relay"]

    assert len(others) == clients + servers + neighbours
    for name in others:
        (interface,) = topology.interfaces(name)
        (route,) = topology.routes(name)
        assert route.via in relay
        assert ip_address(route.via) in interface.addresses[0].network


def test_relay_topology_numbers_hosts_and_addresses() -> None:
    topology = relay_topology(clients=2, servers=2, neighbours=1)
    addresses = {name: topology.interface(name).address for name in topology.names}

    assert addresses == {
        "client": "10.0.0.1",
        "client2": "10.0.0.2",
        "relay": "10.0.0.254",
        "server": "192.168.0.1",
        "server2": "192.168.0.3",
        "neighbour": "192.168.0.254",
    }


@pytest.mark.parametrize("subnet", ["10.0.0.0/32", "nonsense", "10.0.0.1/24"])
def test_relay_topology_refuses_a_subnet_that_cant_hold_it(subnet: str) -> None:
    with pytest.raises(TopologyError):
        relay_topology(subnet)
    with pytest.raises(TopologyError):
        relay_topology(server_subnet=subnet)


def test_a_switched_network_is_drawn_by_subnets() -> None:
    topology = Topology(
        (Host("relay", forwards=True), Host("server", gateway="192.168.0.2"), A),
        (Segment("192.168.0.0/24", "relay .2", "server .1", "a .9", mtu=1400),),
    )

    assert draw(topology).splitlines() == [
        "192.168.0.0/24  mtu 1400",
        "  relay   eth0  192.168.0.2  forwards",
        "  server  eth0  192.168.0.1  gateway 192.168.0.2",
        "  a       eth0  192.168.0.9",
    ]


def test_a_chain_is_drawn_on_one_line_but_no_ring_and_no_star() -> None:
    ring = Topology(
        (A, B, C),
        (
            CABLE,
            Link("b 10.0.1.1/24", "c 10.0.1.2/24"),
            Link("c 10.0.2.1/24", "a 10.0.2.2/24"),
        ),
    )

    star = Topology((A, B, C), (CABLE, Link("a 10.0.2.1/24", "c 10.0.2.2/24")))

    chain = "client 10.0.0.1 ---- 10.0.0.254 relay 192.168.0.2 ---- 192.168.0.1 server"
    assert draw(DEFAULT).splitlines()[0] == chain
    assert "----" not in draw(ring) + draw(star)
    assert draw(Topology((), ())) == ""


FILE = """
[hosts]
client = {gateway = "10.0.0.254"}
relay = {forwards = true}
server = {gateway = "192.168.0.2"}

[[links]]
ends = ["client 10.0.0.1/24", "relay 10.0.0.254/24"]

[[links]]
ends = ["relay 192.168.0.2/24", "server 192.168.0.1/24"]
"""


def test_a_file_says_what_the_code_says() -> None:
    assert parse(FILE) == DEFAULT


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[hosts", "not TOML"),
        ("", "a topology file has a table [hosts] and tables [[links]]"),
        (FILE + "[more]\n", "a topology file has a table [hosts] and tables [[links]]"),
        ("links = []\n[hosts]\na = 1\n", "host a may have forwards = true"),
        ("links = []\n[hosts]\na = {forward = true}\n", "host a may have forwards = true"),
        ("links = []\n[hosts]\na = {forwards = 1}\n", "host a may have forwards = true"),
        ("links = [1]\n[hosts]\n", "a link has two ends"),
        ("[hosts]\n[[links]]\nends = ['a']\n", "a link has two ends"),
        ("[hosts]\n[[links]]\nsubnet = '10.0.0.0/24'\nmembers = [1]\n", "a link has two ends"),
        ("[hosts]\n[[links]]\nends = ['a', 'b']\nmtu = true\n", "mtu is a number"),
        ("[hosts]\n[[links]]\nends = ['a', 'b']\nspeed = 1\n", "a link has no speed like this"),
    ],
)
def test_a_file_that_is_no_topology_is_refused_with_the_reason(text: str, complaint: str) -> None:
    with pytest.raises(TopologyError) as refused:
        parse(text)

    assert complaint in str(refused.value)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=3))
def test_odd_values_in_a_file_are_refused_not_crashed_on(value: object) -> None:
    text = f"[hosts]\na = {{gateway = {toml(value)}}}\n[[links]]\nends = {toml(value)}\n"

    with pytest.raises(TopologyError):
        parse(text)


def toml(value: object) -> str:
    """The value as TOML writes it, None as an empty table."""
    match value:
        case None:
            return "{}"
        case bool():
            return str(value).lower()
        case int():
            return str(value)
        case str():
            return '"' + "".join(f"\\U{ord(c):08x}" for c in value) + '"'
        case list():
            return "[" + ", ".join(map(toml, value)) + "]"
    raise TypeError(value)
