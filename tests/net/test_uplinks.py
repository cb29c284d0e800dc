"""Two uplinks, each with routes of its own for what is sent from its address (`ip rule from`).

                 /--- first ---\\
    client ---- [switch]        relay ---- server
                 \\--- second --/

Each provider lets only its own addresses in from the relay (BCP 38).  What the kernel terminates it
routes by its own address; the server's answers it routes before they have one of ours.
"""

import contextlib
import socket
from collections.abc import Iterator

import pytest

from krelay_vm import Host, Link, Segment, Topology
from tests.net.test_doctor import finding
from tests.net.test_doctor_firewalls import doctor, type_as_root
from tests.net.world import PATIENCE, World

pytestmark = pytest.mark.net

FIRST, SECOND = "192.0.2.2", "203.0.113.2"
TOPOLOGY = Topology(
    hosts=(
        Host("client"),
        Host("first", forwards=True),
        Host("second", forwards=True),
        Host("relay", forwards=True, gateway="192.0.2.1"),
        Host("server", gateway="10.77.3.2"),
    ),
    links=(
        Segment("198.51.100.0/24", "client .5", "first .1", "second .2"),
        Link("first 192.0.2.1/24", f"relay {FIRST}/24"),
        Link("second 203.0.113.1/24", f"relay {SECOND}/24"),
        Link("relay 10.77.3.2/24", "server 10.77.3.1/24"),
    ),
)
BCP38 = """
table ip bcp38 {
  chain f { type filter hook forward priority 0; iifname "eth1" ip saddr != OWN drop; }
}
"""
SERVICES = "tcp/80 tcp/443=forward udp/7 udp/53"


SAME_LINK = Topology(
    hosts=TOPOLOGY.hosts,
    links=(
        TOPOLOGY.links[0],
        Segment("192.0.2.0/24", "first .1", "second .9", "relay .2"),
        TOPOLOGY.links[3],
    ),
)
"""Both providers' routers on one link, on which the relay has an address of each."""


def begin(
    world: World, source: str = "client", services: str = SERVICES, far: str = "eth2"
) -> None:
    """The usual two rules; relaying."""
    for words in (
        "rule add from 203.0.113.2 lookup 102",
        "route add default via 203.0.113.1 table 102",
        f"route add 10.77.3.0/24 dev {far} table 102",
    ):
        world.lab.run("relay", "ip", *words.split())
    for host, own, via in (("first", "192.0.2.0/24", ".1"), ("second", "203.0.113.0/24", ".2")):
        world.nft(host, BCP38.replace("OWN", own))
        world.lab.run("client", "ip", "route", "add", own, "via", f"198.51.100{via}")
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    world.begin(services=services, source=source)


def answered(world: World, address: str, port: int, within: float = PATIENCE) -> bool:
    """Whether a datagram or a connection to that address is answered."""
    with contextlib.suppress(OSError):
        if port in (80, 443):
            with world.open("client") as sock:
                sock.settimeout(within)
                sock.connect((address, port))
                sock.sendall(b"who\n")
                return bool(sock.recv(100))
        with world.open("client", socket.SOCK_DGRAM) as sock:
            sock.settimeout(within)
            return bool(world.exchange(sock, b"who", (address, port)))
    return False


@pytest.fixture
def world(datapath: str) -> Iterator[World]:
    with World(TOPOLOGY, datapath=datapath) as world:
        yield world


@pytest.mark.parametrize("source", ["client", "relay"])
def test_answers_leave_by_the_uplink_that_was_asked_with_the_doctors_mark(
    world: World, source: str
) -> None:
    begin(world, source)
    ports = (80, 443, 7, 53)
    assert [answered(world, FIRST, port) for port in ports] == [True] * 4
    assert answered(world, SECOND, ports[0])
    assert not any(answered(world, SECOND, port, 0.7) for port in ports[1:])
    told = finding(doctor(world, world.client)[1], "uplinks")
    assert told["level"] == "warning"
    assert "who ask 203.0.113.2 leave by eth0 via 192.0.2.1" in told["text"]
    assert "not by eth1 via 203.0.113.1" in told["text"]
    unnamed = finding(doctor(world)[1], "uplinks")
    assert (unnamed["level"], unnamed["fix"]) == ("warning", told["fix"])
    type_as_root(world, told["fix"])

    assert finding(doctor(world, world.client)[1], "uplinks")["level"] == "ok"
    for address in (FIRST, SECOND):
        assert [answered(world, address, port) for port in ports] == [True] * 4
    if source == "client":
        assert world.who_udp("client", 7, to=SECOND).startswith(f"{world.client}:")


def test_two_uplinks_on_one_link_are_told_apart_by_the_address(datapath: str) -> None:
    with World(SAME_LINK, datapath=datapath) as world:
        for host, address in (("relay", SECOND), ("second", "203.0.113.1")):
            link = world.lab.topology.interface(host, "first" if host == "relay" else "relay").name
            world.lab.run(host, "ip", "addr", "add", f"{address}/24", "dev", link)
        begin(world, far="eth1")
        ports = (80, 443, 7, 53)
        assert [answered(world, FIRST, port) for port in ports] == [True] * 4
        assert answered(world, SECOND, ports[0])
        assert not any(answered(world, SECOND, port, 0.7) for port in ports[1:])
        told = finding(doctor(world, world.client)[1], "uplinks")
        assert "leave by eth0 via 192.0.2.1" in told["text"]
        assert "not by eth0 via 203.0.113.1" in told["text"]
        type_as_root(world, told["fix"])
        assert finding(doctor(world, world.client)[1], "uplinks")["level"] == "ok"
        for address in (FIRST, SECOND):
            assert [answered(world, address, port) for port in ports] == [True] * 4


@pytest.mark.one_datapath("what it finds is the host's")
def test_the_mark_is_one_that_nobody_has(world: World) -> None:
    begin(world)
    world.lab.run("relay", "ip", "rule", "add", "fwmark", "102", "lookup", "77")
    told = finding(doctor(world, world.client)[1], "uplinks")
    assert "ip rule add fwmark 103 lookup 102" in told["fix"]
    type_as_root(world, told["fix"])
    assert answered(world, SECOND, 7)


@pytest.mark.one_datapath("what it finds is the host's")
def test_the_doctor_tells_the_mark_from_a_rule_that_nothing_follows(world: World) -> None:
    begin(world)
    told = finding(doctor(world, world.client)[1], "uplinks")
    rule = told["fix"].rpartition("&& ")[2]
    type_as_root(world, rule)
    told = finding(doctor(world, world.client)[1], "uplinks")
    assert (told["level"], "ip rule add" in told["fix"]) == ("warning", False)
    type_as_root(world, told["fix"])
    assert finding(doctor(world, world.client)[1], "uplinks")["level"] == "ok"
    assert answered(world, SECOND, 7)


@pytest.mark.one_datapath("what it finds is the host's")
def test_what_is_terminated_needs_no_mark(world: World) -> None:
    begin(world, services="tcp/80 tcp/443")
    assert answered(world, SECOND, 80)
    assert answered(world, SECOND, 443)
    assert finding(doctor(world, world.client)[1], "uplinks")["level"] == "ok"


@pytest.mark.one_datapath("what it finds is the host's")
def test_a_rule_for_an_address_that_leads_the_same_way_is_fine(world: World) -> None:
    begin(world)
    world.lab.run("relay", "ip", "route", "replace", "default", "via", "203.0.113.1")
    assert finding(doctor(world, world.client)[1], "uplinks")["level"] == "ok"
    assert answered(world, SECOND, 7)
