"""A one-armed relay: the server's packets to clients leave by the link they came by.

    client --- router --- [ relay, server, near, other ]

A kernel that forwards so tells the sender by ICMP redirect of the shorter way.  A server that hears
it answers that client past the relay from then on, UDP and TCP alike.
"""

import contextlib
import shutil
import socket
from collections.abc import Iterator

import pytest

from krelay_vm import Host, Link, Segment, Topology
from tests.net.routed import watching
from tests.net.test_doctor import finding
from tests.net.test_doctor_firewalls import doctor, type_as_root
from tests.net.world import GPORT, PYTHON, SERVICES, World

pytestmark = pytest.mark.net

QUIET = {"net.ipv4.conf.all.send_redirects": 0, "net.ipv4.conf.default.send_redirects": 0}
ONE_ARMED = Topology(
    hosts=(
        Host("client", gateway="10.77.1.254"),
        Host("router", forwards=True, sysctls=QUIET),
        Host("relay", forwards=True, gateway="172.20.1.254"),
        Host("server", gateway="172.20.1.2"),
        Host("near", gateway="172.20.1.2"),
        Host("other", gateway="172.20.1.254"),
    ),
    links=(
        Link("client 10.77.1.1/24", "router 10.77.1.254/24"),
        Segment("172.20.1.0/24", "router .254", "relay .2", "server .1", "near .7", "other .9"),
    ),
)
THROUGH = "udp/7 udp/53 tcp/80 tcp/443=forward"


@pytest.fixture
def world(datapath: str) -> Iterator[World]:
    """Servers, and nothing of krelay's yet."""
    with World(ONE_ARMED, datapath=datapath) as world:
        for host in ("server", "other"):
            world.serve(host, "tcp/80", "tcp/443", "udp/7", "udp/53")
        yield world


def is_redirect(packet: bytes) -> bool:
    """Whether it is ICMP's 5 (RFC 792)."""
    return packet[9] == 1 and packet[(packet[0] & 0xF) * 4] == 5


@contextlib.contextmanager
def no_redirect(world: World, host: str) -> Iterator[None]:
    """None comes to that host meanwhile."""
    with watching(world, host, is_redirect) as watch:
        yield
        with pytest.raises(TimeoutError):
            watch.next(0.3)


def learnt(world: World, host: str, to: str) -> bool:
    """Whether a host goes another way to this address than its routes say."""
    return "redirected" in world.lab.run(host, "ip", "route", "get", to).stdout


def talk(world: World, times: int = 4) -> None:
    """The client is served, again and again, and seen; each new connection needs the answers."""
    for _ in range(times):
        assert world.who_udp("client", 7).startswith(f"{world.client}:")
        assert world.who_udp("client", 53).startswith(f"{world.client}:")
        assert world.who("client", 80).startswith(f"{world.client}:")
        assert world.who("client", 443).startswith(f"{world.client}:")


@pytest.mark.parametrize("services", [SERVICES, THROUGH], ids=["terminated", "forward"])
def test_answers_keep_coming_through_a_one_armed_relay(world: World, services: str) -> None:
    world.begin(services=services)
    with no_redirect(world, "server"):
        talk(world)
    assert not learnt(world, "server", world.client)
    assert world.flows("proto=udp")


def test_no_other_packet_of_the_servers_brings_a_redirect_about(world: World) -> None:
    """One about its own queries would lead its answers as a service away as well."""
    world.serve("client", "udp/9")
    world.begin()
    with no_redirect(world, "server"):
        for _ in range(3):
            assert world.who_udp("server", 9, to=world.client)
    assert not learnt(world, "server", world.client)
    talk(world)


def test_a_client_in_the_servers_subnet_hears_no_redirect(world: World) -> None:
    """It would tell of a packet half rewritten: to a server that client has never asked."""
    world.begin(services=THROUGH)
    with no_redirect(world, "near"):
        for _ in range(4):
            assert world.who_udp("near", 7).startswith(f"{world.relay}:")
            assert world.who("near", 443).startswith(f"{world.relay}:")


def test_a_server_that_was_changed_still_hears_none(world: World) -> None:
    world.begin()
    sock = world.open("client", socket.SOCK_DGRAM)
    assert world.exchange(sock, b"who", (world.relay, 7))
    world.put(real_ip=world.lab.address("other"))
    world.lab.run("other", "ip", "route", "replace", "default", "via", world.relay)
    for host in ("server", "other"):
        with no_redirect(world, host):
            assert world.exchange(sock, b"who", (world.relay, 7))  # an old flow: the first server
            assert world.who_udp("client", 7).startswith(f"{world.client}:")
    assert not learnt(world, "server", world.client)


@pytest.mark.one_datapath("iptables has one")
@pytest.mark.parametrize("tool", ["iptables", "iptables-legacy"])
def test_rules_of_iptables_keep_them_as_well(world: World, tool: str) -> None:
    tools = world.lab.directory / "tools"
    tools.mkdir()
    for part in ("", "-save", "-restore"):
        found = shutil.which(f"{tool}{part}")
        assert found, f"{tool}{part} is not installed"
        (tools / f"{tool}{part}").symlink_to(found)
    daemon = (*PYTHON, "-m", "krelay", "daemon", "--root", str(world.root))
    world.lab.start("relay", "env", f"PATH={tools}", *daemon)
    world.until(lambda: world.answers(world.root), "an answer")
    world.put(services=THROUGH, gport=GPORT, real_ip=world.server)
    world.start_tcp_relay()
    world.put(start=1)
    world.until_state("running")
    assert world.values("status")["rules"] == tool
    with no_redirect(world, "server"):
        talk(world)
    assert not learnt(world, "server", world.client)


def test_redirects_about_packets_of_others_go_on(world: World) -> None:
    world.serve("client", "udp/9")
    world.begin()
    with watching(world, "near", is_redirect) as watch:
        assert world.who_udp("near", 9, to=world.client)
        assert watch.next()


@pytest.mark.one_datapath("what it finds is the host's")
def test_the_doctor_tells_of_redirects_before_krelay_keeps_them(world: World) -> None:
    world.root.mkdir()
    world.write("real_ip", world.server)
    told = finding(doctor(world, world.client)[1], "redirects")
    assert (told["level"], told["safe"]) == ("warning", True)
    assert "both by eth0" in told["text"]
    with watching(world, "server", is_redirect) as watch:
        assert finding(doctor(world, world.client)[1], "return")["level"] == "not tried"
        with pytest.raises(TimeoutError):  # the doctor's own query brings none about
            watch.next(0.3)
        type_as_root(world, told["fix"])
        told = finding(doctor(world, world.client)[1], "redirects")
        assert (told["level"], told["fix"]) == ("ok", None)
        assert "came back" in finding(doctor(world, world.client)[1], "return")["text"]
        with pytest.raises(TimeoutError):
            watch.next(0.3)


@pytest.mark.one_datapath("what it finds is the host's")
def test_the_doctor_is_content_while_krelay_keeps_redirects(world: World) -> None:
    world.start_krelay()
    world.put(real_ip=world.server, services=SERVICES)
    assert "as soon as it relays" in finding(doctor(world)[1], "redirects")["text"]
    world.start_tcp_relay()
    world.put(start=1)
    world.until_state("running")
    with no_redirect(world, "server"):
        told = finding(doctor(world, world.client)[1], "redirects")
    assert (told["level"], "krelay's rules" in told["text"]) == ("ok", True)
