"""Replies to what the relay's host has asked itself, and hosts that it masquerades, from relayed
ports: they go where the kernel's own NAT would send them, and no client's flow comes of them."""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.net.conftest import SharedWorlds
from tests.net.test_flushed_rules import begin_with, iptables
from tests.net.world import World, echo, greet

pytestmark = pytest.mark.net

SERVICES = "udp/7 udp/53 udp/123 udp/40000-40010 tcp/80 tcp/443=forward tcp/41000-41010=forward"
MASQUERADE = """
table ip masquerading {{
  chain post {{
    type nat hook postrouting priority srcnat;
    ip saddr {lan} ip daddr {peer} masquerade
  }}
}}
"""
DATAGRAM = socket.SOCK_DGRAM


def serve(world: World) -> str:
    """The address of a host on the server's side that isn't the server."""
    for host in ("server", "server2", "client2"):
        world.serve(host, "udp/7", "udp/53", "udp/123", "udp/500", "tcp/80", "tcp/443")
    return world.lab.address("server2")


@contextmanager
def asking(datapath: str) -> Iterator[World]:
    """Servers on all sides, and relaying."""
    with World(datapath=datapath) as world:
        serve(world)
        world.begin(services=SERVICES)
        yield world


@pytest.fixture(scope="module")
def shared_worlds(datapath: str) -> Iterator[SharedWorlds]:
    with SharedWorlds(lambda: asking(datapath)) as worlds:
        yield worlds


def ask(world: World, port: int, to: tuple[str, int], host: str = "relay") -> str:
    """Whom `to` saw when this host asked it from that port."""
    with world.open(host, DATAGRAM) as sock:
        sock.bind(("", port))
        return world.exchange(sock, b"who", to).decode().strip()


@pytest.mark.parametrize("source", ["client", "relay"])
@pytest.mark.parametrize("peer", ["server", "server2", "client2"])
def test_replies_to_the_hosts_own_datagrams_reach_it(shared: World, peer: str, source: str) -> None:
    shared.put(source=source)
    there = shared.lab.address(peer)
    here = shared.lab.address("relay", towards=peer)
    for port, to in ((123, 123), (53, 53), (40005, 500), (40005, 53), (123, 123)):
        assert ask(shared, port, (there, to)) == f"{here}:{port}"

    assert shared.flows() == []
    assert shared.values("status")["own_flows"] == 4
    assert shared.who_udp("client", 123)  # and clients are relayed as ever


def test_many_queries_from_port_53_are_answered(shared: World) -> None:
    """With the kernel's own data path, which learns queries to that port without asking."""
    peer = shared.lab.address("server2")
    with shared.open("relay", DATAGRAM) as sock:
        sock.bind(("", 53))
        for number in range(100):
            data = b"question %d" % number
            assert shared.exchange(sock, data, (peer, 53)) == data
            if number % 10 == 0:
                assert shared.who_udp("client", 53).startswith(shared.client)
    assert all(flow["client"].startswith(shared.client) for flow in shared.flows())


@pytest.mark.parametrize(
    ("port", "to"), [(80, 80), (80, 443), (443, 80), (443, 443), (41005, 80), (41005, 443)]
)
@pytest.mark.parametrize("peer", ["server", "client2"])
def test_the_hosts_own_connections_from_relayed_ports_work(
    shared: World, peer: str, port: int, to: int
) -> None:
    there = shared.lab.address(peer)
    here = shared.lab.address("relay", towards=peer)
    with shared.connect("relay", to, to=there, bind=port) as sock:
        assert greet(sock) == f"{here}:{port}"
        for number in range(20):
            echo(sock, b"%d" % number * 1000)

    assert not any(flow["service"].startswith(here) for flow in shared.flows()), shared.flows()
    assert shared.who("client", 80).startswith(shared.client)
    assert shared.who("client", 443).startswith(shared.client)


@pytest.mark.parametrize("peer", ["server", "server2"])
def test_replies_reach_hosts_that_are_masqueraded(shared: World, peer: str) -> None:
    there = shared.lab.address(peer)
    lan = shared.client
    shared.nft("relay", MASQUERADE.format(lan=lan, peer=there))
    for port, to in ((123, 123), (53, 53), (40005, 500), (53, 53)):
        assert ask(shared, port, (there, to), "client") == f"{shared.relay}:{port}"
    for port in (443, 41005):
        with shared.connect("client", 80, to=there, bind=port) as sock:
            assert greet(sock) == f"{shared.relay}:{port}"
            for number in range(20):
                echo(sock, b"%d" % number * 1000)

    assert not any(flow["service"].startswith(shared.relay) for flow in shared.flows())


def test_a_clients_flow_is_never_the_hosts_own(shared: World) -> None:
    """Whoever may use a port of the relay's host can't have what clients send there."""
    towards_clients = shared.lab.address("relay", towards="client")
    with shared.open("client", DATAGRAM) as sock, shared.open("relay", DATAGRAM) as own:
        sock.bind(("", 123))
        own.bind(("", 123))
        for _ in range(6):
            seen = shared.exchange(sock, b"who", (towards_clients, 123))
            assert seen.decode().strip() == f"{shared.client}:123"
            own.sendto(b"mine", (shared.client, 123))
            assert sock.recvfrom(100) == (b"mine", (towards_clients, 123))

    assert shared.values("status")["own_flows"] == 0


def test_a_reply_that_came_first_is_put_right(world: World) -> None:
    """Its query went out before relaying began."""
    peer = serve(world)
    world.start_krelay()
    world.put(services="udp/123", real_ip=world.server)
    # Without the server's answer: it is a client's whose server is down.
    world.lab.run("server", "ip", "link", "set", "eth0", "down")
    with world.open("relay", DATAGRAM) as sock, world.open("server2", DATAGRAM) as there:
        sock.bind(("", 123))
        there.bind(("", 1230))
        sock.sendto(b"question", (peer, 1230))
        assert there.recvfrom(100)[0] == b"question"
        world.put(start=1)
        world.until_state("running")
        there.sendto(b"late", (world.relay, 123))
        world.until(lambda: len(world.flows()) == 1, "a row of it")
        for number in range(3):
            sock.sendto(b"again", (peer, 1230))
            assert there.recvfrom(100)[0] == b"again"
            there.sendto(b"%d" % number, (world.relay, 123))
            assert sock.recvfrom(100)[0] == b"%d" % number

    assert world.flows() == []


def test_errors_about_own_datagrams_reach_their_sender(shared: World) -> None:
    peer = shared.lab.address("server2")
    with shared.open("relay", DATAGRAM) as sock:
        sock.bind(("", 123))
        sock.connect((peer, 9))
        for _ in range(3):
            sock.send(b"nobody there")
            with pytest.raises(ConnectionRefusedError):
                sock.recv(100)

    assert shared.flows() == []


@pytest.mark.one_datapath("a timer of the worker's")
def test_own_flows_are_forgotten_without_replies(world: World) -> None:
    """Then who has that address and port is a client, as before."""
    serve(world)
    world.begin(services=SERVICES)
    with world.open("relay", DATAGRAM) as sock, world.open("client", DATAGRAM) as there:
        sock.bind(("", 123))
        there.bind(("", 1230))
        sock.sendto(b"question", (world.client, 1230))
        assert there.recvfrom(100)[0] == b"question"
        world.until(lambda: world.values("status")["own_flows"] == 1, "remembered")
        began = time.monotonic()
        world.until(lambda: world.values("status")["own_flows"] == 0, "forgotten", timeout=40)
        assert time.monotonic() - began > 25
        seen = world.exchange(there, b"who", (world.relay, 123)).decode().strip()
        assert seen == f"{world.client}:1230"


@pytest.mark.one_datapath("iptables has no other")
@pytest.mark.parametrize("flavour", ["", "-legacy"])
def test_with_iptables_replies_reach_the_host_too(flavour: str) -> None:
    with World(datapath="queue") as world:
        peer = serve(world)
        begin_with(world, SERVICES, **iptables(flavour))
        assert "iptables" in str(world.values("status")["rules"])
        for port, to in ((123, 123), (53, 53), (40005, 500)):
            assert ask(world, port, (peer, to)) == f"{world.relay}:{port}"
            assert ask(world, port, (world.server, to)) == f"{world.relay}:{port}"
        with world.connect("relay", 80, to=peer, bind=443) as sock:
            assert greet(sock) == f"{world.relay}:443"
            echo(sock, b"and back")
        assert world.flows() == []


def test_the_hosts_connections_outlive_a_start_and_a_kill(world: World) -> None:
    """From a port of a forwarded service, and to a server of this host on one."""
    serve(world)
    world.serve("relay", "tcp/443")
    there, here = (world.lab.address("client2"), world.lab.address("relay", towards="client2"))
    to_here = world.connect("client2", 443, to=here)
    greet(to_here)
    own = world.connect("relay", 80, to=there, bind=41005)
    assert greet(own) == f"{here}:41005"
    world.begin(services=SERVICES)
    for _ in range(2):
        to_here.sendall(b"from there first")
        assert to_here.recv(100) == b"from there first"
        echo(own, b"and from here")
        world.kill(world.krelay_process)
        world.start_krelay()
        world.until_state("running")
        world.until(lambda: world.values("status")["tcp_relays"] == 1, "tcp-relay is back")
    assert world.flows() == []
