"""The cases that are easy to forget: whose packets are rewritten, and whose are not."""

import socket
import time
from contextlib import ExitStack
from functools import partial
from statistics import median

import pytest

from tests.net.world import GPORT, World, echo, greet

pytestmark = pytest.mark.net


def host_of(address: str) -> str:
    """ADDRESS of ADDRESS:PORT."""
    return address.rpartition(":")[0]


def port_of(address: str) -> int:
    """PORT of ADDRESS:PORT."""
    return int(address.rpartition(":")[2])


def flow_of(world: World, sock: socket.socket) -> dict[str, str]:
    """The flow of a client's TCP connection through the relay."""
    host, port = sock.getsockname()
    peer = "{}:{}".format(*sock.getpeername())
    flows = world.flows(f"proto=tcp client={host}:{port}")
    (flow,) = (flow for flow in flows if flow["service"] == peer)
    return flow


def reusable(world: World, host: str, port: int) -> socket.socket:
    """A TCP socket with a port that another one of this host may have, too."""
    sock = world.open(host)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", port))
    return sock


@pytest.mark.parametrize("host", ["client", "client2"])
def test_the_server_sees_the_client(relaying: World, host: str) -> None:
    address = relaying.lab.address(host)

    assert host_of(relaying.who(host, 80)) == address
    assert host_of(relaying.who_udp(host, 7)) == address


def test_udp_keeps_the_clients_port(relaying: World) -> None:
    assert relaying.who_udp("client", 7, bind=40007) == f"{relaying.client}:40007"


def test_the_server_never_sees_the_clients_own_tcp_port(relaying: World) -> None:
    with relaying.connect("client", 80, bind=40080) as sock:
        seen = greet(sock)

    assert host_of(seen) == relaying.client
    assert port_of(seen) != 40080


def test_the_relays_address_towards_the_clients_serves_as_well(relaying: World) -> None:
    near = relaying.lab.address("relay", towards="client")

    assert host_of(relaying.who("client", 80, to=near)) == relaying.client
    assert host_of(relaying.who_udp("client", 7, to=near)) == relaying.client


def test_the_relay_hosts_own_connections_are_its_own(relaying: World) -> None:
    to = relaying.server

    assert host_of(relaying.who("relay", 80, to=to)) == relaying.relay
    assert host_of(relaying.who_udp("relay", 7, to=to)) == relaying.relay
    assert host_of(relaying.who("client", 80)) == relaying.client


def test_what_the_relay_host_sends_to_the_server_is_seen_whichever_address_it_has(
    world: World,
) -> None:
    """Of its own packets the worker must know, lest a flow gets their port; how is by POSTROUTING's
    telling that they have come in by no interface."""
    world.serve("server", "tcp/443", "udp/7")
    world.begin(services="tcp/443=forward udp/7")
    before = 0
    for towards in ("client", "server"):
        own = world.lab.address("relay", towards=towards)
        with world.open("relay", socket.SOCK_DGRAM) as sock:
            sock.bind((own, 0))
            assert world.exchange(sock, b"own", (world.server, 7)) == b"own"
        with world.open("relay") as sock:
            sock.bind((own, 0))
            sock.connect((world.server, 443))
            greet(sock)
        after = world.values("counters")["passed_own"]
        assert after >= before + 3
        before = after


def test_who_asks_the_gateway_port_is_refused_also_while_others_are_served(
    relaying: World,
) -> None:
    served = relaying.connect("client", 80)
    greet(served)
    near = relaying.lab.address("relay", towards="client")
    for host in ("client", "client2", "server", "neighbour"):
        for to in (relaying.relay, near):
            with pytest.raises(ConnectionRefusedError):
                relaying.connect(host, GPORT, to=to)
    with (
        pytest.raises(ConnectionResetError),
        relaying.connect("relay", GPORT, to="127.0.0.1") as own,
    ):
        own.recv(1)
    echo(served, b"undisturbed")


def test_a_relayed_connection_bears_a_direct_one_from_its_port_to_the_gateway_port(
    shared: World,
) -> None:
    served = reusable(shared, "client", 41000)
    served.connect((shared.relay, 80))
    greet(served)
    direct = reusable(shared, "client", 41000)
    with pytest.raises((ConnectionError, TimeoutError)) as failed:
        direct.connect((shared.relay, GPORT))

    echo(served, b"undisturbed")
    assert flow_of(shared, served)["state"] == "established"
    assert failed.type is ConnectionRefusedError


@pytest.mark.parametrize("host", ["server", "neighbour"])
def test_who_is_beside_the_server_is_seen_as_the_relay(relaying: World, host: str) -> None:
    assert host_of(relaying.who(host, 80)) == relaying.relay
    assert host_of(relaying.who_udp(host, 7)) == relaying.relay
    with relaying.connect(host, 443) as sock:
        greet(sock)
        assert flow_of(relaying, sock)["source"] == "relay"
        echo(sock, bytes(range(256)) * 1000)


def test_a_client_may_ask_the_server_directly(relaying: World) -> None:
    to = relaying.server

    assert host_of(relaying.who("client", 80, to=to)) == relaying.client
    assert relaying.who_udp("client", 7, to=to, bind=40017) == f"{relaying.client}:40017"


def test_a_direct_connection_from_the_relay_port_disturbs_nobody(relaying: World) -> None:
    relayed = relaying.connect("client", 80)
    seen = greet(relayed)
    y = port_of(flow_of(relaying, relayed)["relay"])
    assert seen == f"{relaying.client}:{y}"
    direct = relaying.connect("client", 80, to=relaying.server, bind=y)

    assert host_of(greet(direct)) == relaying.client
    for size in (1, 1000, 100_000):
        echo(direct, b"d" * size)
        echo(relayed, b"r" * size)
    direct.close()
    echo(relayed, b"still there")


def test_a_direct_datagram_from_the_port_of_a_relayed_one_disturbs_nobody(
    relaying: World,
) -> None:
    both = relaying.open("client", socket.SOCK_DGRAM)
    both.bind(("", 40053))
    for number in range(3):
        for to in (relaying.relay, relaying.server):
            data = f"{number} {to}".encode()
            assert relaying.exchange(both, data, (to, 7)) == data
    first = relaying.open("client", socket.SOCK_DGRAM)
    first.bind(("", 40054))
    for to in (relaying.server, relaying.relay, relaying.server):
        assert relaying.exchange(first, to.encode(), (to, 7)) == to.encode()


def test_relay_ports_keep_clear_of_the_clients_direct_connections(datapath: str) -> None:
    with World(datapath=datapath) as world:
        world.serve("server", "tcp/80")
        sysctl = ("sysctl", "-qw", "net.ipv4.ip_local_port_range=40000 40015")
        world.lab.run("relay", *sysctl)
        world.begin()
        taken = range(40000, 40005)
        direct = [world.connect("client", 80, to=world.server, bind=port) for port in taken]
        assert [port_of(greet(sock)) for sock in direct] == list(taken)
        relayed = [world.connect("client", 80) for _ in range(6)]
        ports = {port_of(greet(sock)) for sock in relayed}

        assert len(ports) == 6
        assert not ports & set(taken)
        for sock in (*direct, *relayed):
            echo(sock, b"each its own")


def test_one_client_port_can_talk_to_two_services_at_once(relaying: World) -> None:
    one, other = (reusable(relaying, "client", 42000) for _ in range(2))
    one.connect((relaying.relay, 80))
    other.connect((relaying.relay, 443))

    assert {host_of(greet(sock)) for sock in (one, other)} == {relaying.client}
    echo(one, b"1" * 100_000)
    echo(other, b"2" * 100_000)
    flows = relaying.flows(f"client={relaying.client}:42000 state=established")
    assert {flow["service"] for flow in flows} == {f"{relaying.relay}:80", f"{relaying.relay}:443"}
    one.close()
    echo(other, b"left alone")


def test_one_udp_port_can_talk_to_two_services_at_once(relaying: World) -> None:
    sock = relaying.open("client", socket.SOCK_DGRAM)
    sock.bind(("", 42001))
    for number in range(3):
        for port in (7, 53):
            data = b"%d %d" % (number, port)
            assert relaying.exchange(sock, data, (relaying.relay, port)) == data


def test_a_port_can_be_used_again_at_once(relaying: World) -> None:
    for _ in range(10):
        sock = reusable(relaying, "client", 42002)
        sock.connect((relaying.relay, 80))
        greet(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset
        sock.close()


def test_other_ports_and_ping_are_the_relay_hosts_own(relaying: World) -> None:
    with relaying.open("relay") as listener:
        listener.bind(("", 8000))
        listener.listen()
        with relaying.connect("client", 8000) as sock:
            accepted, peer = listener.accept()
            accepted.close()
            assert peer == sock.getsockname()
    with pytest.raises(ConnectionRefusedError):
        relaying.connect("client", 8001)
    for to in (relaying.relay, relaying.server):
        assert ping(relaying, to)


def ping(world: World, to: str) -> bool:
    """Whether an ICMP echo request is answered (RFC 792)."""
    with world.lab.enter("client"), socket.socket(socket.AF_INET, socket.SOCK_RAW, 1) as sock:
        sock.settimeout(30)
        request = bytes.fromhex("0800f7fd00010001")
        sock.sendto(request, (to, 0))
        while True:
            packet, (peer, _) = sock.recvfrom(1500)
            if packet[20] == 0 and packet[24:] == request[4:]:
                return bool(peer == to)


def test_source_relay_shows_the_relay_for_tcp_and_udp_and_each_client_its_answers(
    shared: World,
) -> None:
    shared.put(source="relay")

    for host in ("client", "client2", "server", "neighbour"):
        assert host_of(shared.who(host, 80)) == shared.relay
    socks = []
    for host in ("client", "client2", "neighbour"):  # the same port: the relay must tell them apart
        sock = shared.open(host, socket.SOCK_DGRAM)
        sock.bind(("", 43000))
        socks.append(sock)
    seen = {shared.exchange(sock, b"who", (shared.relay, 7)).decode().strip() for sock in socks}
    assert {host_of(one) for one in seen} == {shared.relay}
    assert len(seen) == 3
    for sock in socks:
        for number in range(3):
            data = f"{sock.getsockname()} {number}".encode()
            assert shared.exchange(sock, data, (shared.relay, 7)) == data


def test_flows_keep_gateway_port_server_source_and_service_they_began_with(
    shared: World,
) -> None:
    second = shared.lab.address("server2")
    shared.serve("server2", "tcp/8080")
    tcp = shared.connect("client", 80)
    udp = shared.open("client", socket.SOCK_DGRAM)
    seen, seen_udp = greet(tcp), shared.exchange(udp, b"who", (shared.relay, 7))
    before = flow_of(shared, tcp)
    kept = ("id", "gport", "relay", "server", "source", "service")

    for change in (
        {"gport": 19000},
        {"source": "relay"},
        {"real_ip": second},
        {"services": "tcp/8080 udp/5353"},
    ):
        shared.put(**change)
        echo(tcp, b"goes on" * 1000)
        assert shared.exchange(udp, b"who", (shared.relay, 7)) == seen_udp
    after = flow_of(shared, tcp)
    assert [after[name] for name in kept] == [before[name] for name in kept]
    assert host_of(seen) == shared.client
    assert host_of(shared.who("client", 8080)) == shared.relay
    with pytest.raises(ConnectionRefusedError):
        shared.connect("client", 80)
    with pytest.raises(ConnectionRefusedError):
        shared.connect("client", GPORT)
    tcp.close()


@pytest.mark.serial
def test_a_change_is_in_force_within_a_tenth_of_a_second(world: World) -> None:
    world.serve("server", "tcp/80", "tcp/8080")
    world.begin()
    took: list[float] = []
    for number in range(5):
        for name, value in (
            ("gport", f"{19000 + number}"),
            ("services", f"tcp/80 tcp/{9000 + number}"),
        ):
            (world.root / name).write_text(value + "\n")  # no shell, which takes its own time
            began = time.monotonic()
            world.until(partial(world.applies, name, value), f"{name}={value}", timeout=2)
            took.append(time.monotonic() - began)
        assert host_of(world.who("client", 80)) == world.client
    assert {flow["gport"] for flow in world.flows("proto=tcp")} == set(range(19000, 19005))
    assert median(took) < 0.1, took  # not each: the machine may be busy with others


def test_kill_ends_a_flow_and_resets_both_its_connections(shared: World) -> None:
    with ExitStack() as stack:
        victim, other = (stack.enter_context(shared.connect("client", 80)) for _ in range(2))
        server_leg = greet(victim)
        greet(other)
        number = flow_of(shared, victim)["id"]
        assert shared.ask(f"kill {number}") == [f"killed={number}"]

        with pytest.raises(ConnectionResetError):
            victim.recv(1)
        ss = ("ss", "-Htn", "state", "established", "dst", server_leg)
        shared.until(lambda: not shared.lab.run("server", *ss).stdout, "the server's end reset")
        echo(other, b"left alone")
    shared.who_udp("client", 7, bind=43001)
    (flow,) = shared.flows(f"client={shared.client}:43001")
    shared.ask(f"kill {flow['id']}")
    assert not shared.flows(f"client={shared.client}:43001")
