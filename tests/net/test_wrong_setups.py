"""Hosts as people set them up wrongly: relaying is broken, or less than it should be.

Each time the doctor names what is wrong, and what it says to type, typed as printed, puts it right.

Flow tables and VRFs, which this kernel may not have, are in tests/vm/test_routers.py, on Debian's
kernel in QEMU.  User namespaces, where all works that did not, are in test_user_namespaces.py.
"""

import contextlib
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from krelay_vm import Program, Topology
from tests.net import test_redirects, test_uplinks
from tests.net.test_closed_output import CLOSED, killed
from tests.net.test_closed_output import is_reset as is_told
from tests.net.test_doctor import sysctl
from tests.net.test_doctor_firewalls import DOCKER, doctor, type_as_root
from tests.net.test_firewall import MASQUERADE
from tests.net.test_tracking_timers import README, Sip, guard, is_forgotten
from tests.net.world import GPORT, World, greet

pytestmark = pytest.mark.net

SERVICES = "tcp/80 tcp/443=forward udp/7 udp/53 udp/5060"
SHORT = 0.7
"""Seconds for what should not come."""
MANY = 8
"""Connections at a time, of one client's."""


def seen(world: World, port: int, within: float) -> str:
    """The address that the server sees of a client; empty without an answer."""
    kind = socket.SOCK_STREAM if port in (80, 443) else socket.SOCK_DGRAM
    with contextlib.suppress(OSError), world.open("client", kind) as sock:
        sock.settimeout(within)
        sock.connect((world.relay, port))
        sock.sendall(b"who\n" if kind is socket.SOCK_STREAM else b"who")
        return sock.recv(100).decode().rpartition(":")[0]
    return ""


def seen_by_all(world: World, within: float) -> list[str]:
    return [seen(world, port, within) for port in (80, 443, 7, 53)]


def relays(world: World, within: float) -> bool:
    """All services are answered, and the server sees the client."""
    return seen_by_all(world, within) == [world.client] * 4


def answers(world: World, within: float) -> bool:
    """All services are answered, whomever the server sees."""
    return all(seen_by_all(world, within))


def many_at_a_time(world: World, within: float) -> bool:
    """Several connections of one client live at once."""
    socks = [world.open("client") for _ in range(MANY)]
    try:
        for sock in socks:
            sock.settimeout(within)
            sock.connect((world.relay, 80))
            sock.sendall(b"who\n")
        return all(sock.recv(100) for sock in socks)
    except OSError:
        return False
    finally:
        for sock in socks:
            sock.close()


def rings(world: World, within: float) -> bool:
    """The server reaches a client that has been silent."""
    sip = Sip(world)
    sip.register()
    if within == SHORT:
        is_forgotten(world)
    found = sip.rings(within)
    sip.server.close()
    return found


def is_killed(world: World, within: float) -> bool:
    """A killed connection's client is told."""
    return is_told(killed(world), within)


def own_server_is_heard(world: World, within: float) -> bool:
    """Whatever listens on the relay host, the real server answers; nobody else has the port."""
    listening = world.lab.is_listening("relay", "tcp", 80)
    return not listening and relays(world, within)


def nft(text: str) -> Callable[[World], None]:
    return lambda world: world.nft("relay", text.replace("SERVER", world.server))


def listen(port: int) -> Callable[[World], Program]:
    """A program of the host's own."""

    def begin(world: World) -> Program:
        argv = (sys.executable, "-m", "http.server", "--bind", "0.0.0.0", str(port))
        program = world.lab.start("relay", *argv)
        world.lab.wait_listening("relay", "tcp", port)
        return program

    return begin


def route_past(world: World) -> None:
    """The server's answers to clients take another router."""
    neighbour = world.lab.address("neighbour")
    world.lab.run("server", "ip", "route", "replace", "default", "via", neighbour)


def docker(world: World) -> None:
    world.lab.run("relay", "iptables-restore", "--noflush", input=DOCKER)


def reserve(world: World) -> None:
    sysctl(world, "net.ipv4.ip_local_reserved_ports=32768-60993")  # six are left


def short_timers(world: World) -> None:
    guard(world, README.replace("443 accept", "443 accept\nip daddr SERVER udp dport 7 accept"))
    sysctl(world, *(f"net.netfilter.nf_conntrack_udp_timeout{part}=1" for part in ("", "_stream")))


class Setup(NamedTuple):
    """A wrong set-up."""

    name: str
    make: Callable[[World], object]
    works: Callable[[World, float], bool]
    """What doesn't, until it is put right."""
    check: str
    words: str
    """Of the finding."""
    level: str = "failed"


FIREWALL = """
table inet guard {
  chain input { type filter hook input priority 0; policy drop; ct state established accept; iifname "lo" accept; tcp dport 22 accept; }
  chain forward { type filter hook forward priority 0; policy drop; }
}
"""  # noqa: E501
SETUPS = [
    Setup("firewall", nft(FIREWALL), relays, "firewall", "policy of nft chain inet guard input"),
    Setup("docker", docker, relays, "firewall", "iptables -t filter chain FORWARD"),
    Setup("OUTPUT drop", nft(CLOSED), is_killed, "firewall", "krelay itself sends", "warning"),
    Setup("masquerade", nft(MASQUERADE % '"eth1"'), relays, "firewall", "given another source",
          "warning"),
    Setup("routes", route_past, answers, "return", "didn't come back"),
    Setup("own services", listen(80), own_server_is_heard, "services", "serves tcp/80 here",
          "warning"),
    Setup("reserved ports", reserve, many_at_a_time, "ports", "6 are left", "warning"),
    Setup("timers", short_timers, rings, "timers", "forgets udp flows after 1 s", "warning"),
    Setup("no forwarding", lambda w: sysctl(w, "net.ipv4.ip_forward=0"), relays, "forwarding",
          "doesn't forward"),
]  # fmt: skip


def told(world: World, check: str, words: str) -> list[dict[str, Any]]:
    """The findings of that check that aren't ok; one has these words."""
    _, findings = doctor(world, world.client)
    found = [f for f in findings if f["check"] == check and f["level"] != "ok"]
    assert any(words in f["text"] for f in found), (words, findings)
    return found


def fix(world: World, findings: list[dict[str, Any]]) -> None:
    for command in dict.fromkeys(f["fix"] for f in findings):
        assert command, findings
        type_as_root(world, command)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_the_doctor_names_what_is_wrong_and_its_fix_works(world: World, setup: Setup) -> None:
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    setup.make(world)
    world.begin(services=SERVICES)
    assert not setup.works(world, SHORT)
    for _ in range(2):  # what was behind another may be told only then
        findings = told(world, setup.check, setup.words)
        assert max(f["level"] == setup.level for f in findings)
        fix(world, findings)
        _, findings = doctor(world, world.client)
        if not [f for f in findings if f["check"] == setup.check and f["level"] != "ok"]:
            break
    if setup.check == "ports":  # which tcp-relay reads when it starts
        world.kill(world.tcp_relay_process)
        world.start_tcp_relay()
    assert [f for f in findings if f["check"] == setup.check and f["level"] != "ok"] == []
    assert setup.works(world, 5.0)


def test_another_program_on_the_gateway_port(world: World) -> None:
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    world.start_krelay()
    world.put(gport=GPORT, services=SERVICES, real_ip=world.server)
    other = listen(GPORT)(world)
    world.write("start", "1")
    world.until(lambda: world.read("status/state").startswith("failed: "), "failed")
    assert not relays(world, SHORT)
    fix(world, told(world, "gateway port", f"port {GPORT} is in use by python"))
    other.wait()
    world.start_tcp_relay()
    world.until_state("running")
    assert relays(world, 5.0)


@contextlib.contextmanager
def other(topology: Topology, datapath: str) -> Iterator[World]:
    with World(topology, datapath=datapath) as world:
        yield world


def test_redirects_that_a_server_has_heard(datapath: str) -> None:
    """Before krelay relays, the host forwards for the server, and tells it of the router."""
    with other(test_redirects.ONE_ARMED, datapath) as world:
        world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
        world.serve("client", "udp/9")
        world.root.mkdir()
        world.write("real_ip", world.server)
        findings = told(world, "redirects", "tell the server by ICMP redirect")

        def has_learnt() -> bool:
            assert world.who_udp("server", 9, to=world.client)
            return test_redirects.learnt(world, "server", world.client)

        world.until(has_learnt, "another way")
        world.begin(services=SERVICES)
        assert not relays(world, SHORT)
        (failed,) = told(world, "return", "didn't come back")
        assert "`ip route flush cache` there" in failed["text"]
        world.lab.run("server", "ip", "route", "flush", "cache")
        assert relays(world, 5.0)
        assert not test_redirects.learnt(world, "server", world.client)

        world.krelay("stop")  # and without krelay, as the doctor said
        fix(world, findings)
        assert not any(has_learnt() for _ in range(10))


def test_two_uplinks(datapath: str) -> None:
    with other(test_uplinks.TOPOLOGY, datapath) as world:
        test_uplinks.begin(world)
        asked = world.relay = test_uplinks.SECOND
        assert seen_by_all(world, SHORT) == [world.client, "", "", ""]
        fix(world, told(world, "uplinks", f"who ask {asked} leave by eth0"))
        assert relays(world, 5.0)


def test_a_connection_outlives_its_mends(world: World) -> None:
    """What the doctor has typed ends no connection that works."""
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    world.begin(services=SERVICES)
    socks = [world.connect("client", port) for port in (80, 443)]
    for sock in socks:
        greet(sock)
    world.nft("relay", FIREWALL)
    fix(world, told(world, "firewall", "guard"))
    for sock in socks:
        sock.sendall(b"still there")
        assert sock.recv(100) == b"still there"
