"""The relay host as a client of its own services: its admin's curl, a health check, a program.

What it sends to itself never leaves it and isn't relayed.  The doctor says so, and has a rule by
which the host's own NAT leads such packets to the server.  Containers on it are usual clients.
"""

import contextlib
import re
import socket

import pytest

from tests.net.test_doctor import finding
from tests.net.test_doctor_firewalls import doctor, type_as_root
from tests.net.world import PATIENCE, World

pytestmark = pytest.mark.net

SERVICES = "tcp/80 tcp/443=forward udp/7 udp/53"


def answered(world: World, host: str, address: str, port: int, within: float = PATIENCE) -> bool:
    """Whether a program of that host has an answer."""
    with contextlib.suppress(OSError):
        if port in (80, 443):
            with world.open(host) as sock:
                sock.settimeout(within)
                sock.connect((address, port))
                sock.sendall(b"who\n")
                return bool(sock.recv(100))
        with world.open(host, socket.SOCK_DGRAM) as sock:
            sock.settimeout(within)
            sock.connect((address, port))
            sock.send(b"who")
            return bool(sock.recv(100))
    return False


def told_rule(world: World) -> str:
    """The command that the doctor has in its words."""
    told = finding(doctor(world, world.client)[1], "this host")
    assert (told["level"], told["fix"]) == ("ok", None)
    match = re.search(r"nft '.*'$", told["text"])
    assert match, told["text"]
    return match[0]


@pytest.mark.parametrize("source", ["client", "relay"])
def test_the_relay_host_reaches_its_own_services_by_the_rule_that_the_doctor_has(
    world: World, source: str
) -> None:
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    world.begin(services=SERVICES, source=source)
    addresses = (world.relay, world.lab.address("relay", towards="client"))
    ports = (80, 443, 7, 53)
    assert not any(answered(world, "relay", world.relay, port, 1) for port in ports)
    assert all(answered(world, "relay", world.server, port) for port in ports)  # the server itself
    type_as_root(world, told_rule(world))

    for _ in range(3):
        for address in addresses:
            for port in ports:
                assert answered(world, "relay", address, port), (address, port)
    told = finding(doctor(world, world.client)[1], "this host")
    assert told["text"] == "its own programs reach the services by its own rules"
    for port in ports:  # and clients are relayed as before
        assert answered(world, "client", world.relay, port)
    seen = world.who_udp("client", 7)
    assert seen.startswith(f"{world.client if source == 'client' else world.relay}:")


def test_own_programs_and_clients_from_the_same_port_are_both_served(world: World) -> None:
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    world.begin(services=SERVICES)
    type_as_root(world, told_rule(world))
    socks = {}
    for host in ("client", "relay"):
        socks[host] = world.open(host, socket.SOCK_DGRAM)
        socks[host].bind(("", 40007))
        socks[host].connect((world.relay, 7))
    for _ in range(3):
        for sock in socks.values():
            sock.send(b"who")
            assert sock.recv(100).endswith(b":40007\n")


def test_a_container_on_the_relay_host_is_a_client(world: World) -> None:
    """A link of its own, as docker0 is; without any rule."""
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    world.begin(services=SERVICES)
    client2 = world.lab.namespace("client2")
    world.lab.run("relay", "ip", "link", "add", "docker0", "type", "veth", "peer", "name", "inner",
                  "netns", client2)  # fmt: skip
    for host, link, address in (
        ("relay", "docker0", "172.17.0.1"),
        ("client2", "inner", "172.17.0.2"),
    ):
        world.lab.run(host, "ip", "addr", "add", f"{address}/16", "dev", link)
        world.lab.run(host, "ip", "link", "set", link, "up")
    world.lab.run("client2", "ip", "route", "replace", "default", "via", "172.17.0.1")
    world.lab.run("client2", "ip", "link", "set", "eth0", "down")
    for port in (80, 443, 7, 53):
        assert answered(world, "client2", world.relay, port), port


def test_the_host_asks_the_server_itself_while_it_relays(world: World) -> None:
    """The other way that the doctor names."""
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    world.begin(services=SERVICES)
    assert f"let them ask {world.server} itself" in finding(doctor(world)[1], "this host")["text"]
    for _ in range(3):
        for port in (80, 443, 7, 53):
            assert answered(world, "relay", world.server, port), port
