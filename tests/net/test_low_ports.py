"""A client's port below 1024 means privilege to some servers (NFS's `secure`)."""

import re
import socket

import pytest

from tests.net.world import World, echo, greet

pytestmark = pytest.mark.net
both_sources = pytest.mark.parametrize("source", ["client", "relay"])


def port_of(seen: str) -> int:
    return int(seen.rpartition(":")[2])


@both_sources
@pytest.mark.parametrize("services", ["tcp/80", "tcp/80=forward"])
def test_low_port_is_seen_as_low_and_high_as_high(
    shared: World, source: str, services: str
) -> None:
    shared.put(services=services, source=source)
    host = shared.client if source == "client" else shared.relay

    for port in (777, 1023, 1):
        with shared.connect("client", 80, bind=port) as sock:
            assert greet(sock) == f"{host}:{port}"
            echo(sock, bytes(range(256)) * 400)
    for port in (1024, 40000):
        assert port_of(shared.who("client", 80, bind=port)) >= 1024


@both_sources
def test_datagrams_low_port_is_seen_as_low(shared: World, source: str) -> None:
    shared.put(source=source)
    for host in ("client", "client2"):
        assert port_of(shared.who_udp(host, 7, bind=777)) < 1024
        assert port_of(shared.who_udp(host, 7, bind=7777)) >= 1024


@both_sources
def test_low_port_in_use_gives_way_to_another_low_one(shared: World, source: str) -> None:
    shared.put(source=source)
    seen = []
    for host, to in (
        ("client", shared.relay),
        ("client2", shared.relay),
        ("client", shared.lab.address("relay")),
    ):
        sock = shared.open(host)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", 777))
        sock.connect((to, 80))
        seen.append((greet(sock), sock))

    assert len({each for each, _ in seen}) == 3
    assert all(port_of(each) < 1024 for each, _ in seen)
    for _, sock in seen:
        echo(sock, bytes(range(256)) * 40)


def test_clients_own_connection_from_that_port_goes_on(shared: World) -> None:
    for first, second in ((shared.server, shared.relay), (shared.relay, shared.server)):
        socks = []
        port = 777 if first == shared.server else 778
        for to in (first, second):
            sock = shared.open("client")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", port))
            sock.connect((to, 80))
            seen = greet(sock)
            assert seen.startswith(f"{shared.client}:")
            assert port_of(seen) < 1024
            socks.append(sock)
        for sock in socks:
            echo(sock, bytes(range(256)) * 40)


def test_relay_hosts_own_connection_from_that_port_goes_on(shared: World) -> None:
    shared.put(source="relay")
    own = shared.connect("relay", 80, to=shared.server, bind=777)
    assert greet(own) == f"{shared.relay}:777"
    sock = shared.connect("client", 80, bind=777)
    assert port_of(greet(sock)) not in (777, *range(1024, 65536))
    taken = shared.connect("client", 80, bind=778)
    assert greet(taken) == f"{shared.relay}:778"
    beside = shared.connect("relay", 80, to=shared.server, bind=778)
    assert port_of(greet(beside)) < 1024
    for each in (own, sock, taken, beside):
        echo(each, bytes(range(256)) * 40)


@both_sources
def test_low_port_outlives_a_killed_krelay(world: World, source: str) -> None:
    world.serve("server", "tcp/80")
    world.begin(services="tcp/80", source=source)
    socks = [world.connect(host, 80, bind=777) for host in ("client", "client2")]
    seen = [greet(sock) for sock in socks]

    world.kill(world.krelay_process)
    world.start_krelay()
    world.until_state("running")

    for sock in socks:
        echo(sock, bytes(range(256)) * 400)
    world.until(lambda: len(world.flows("proto=tcp")) == 2, "both to be resumed")
    assert all(port_of(each) < 1024 for each in seen)


@both_sources
def test_low_ports_are_used_again(shared: World, source: str) -> None:
    shared.put(source=source)
    for _ in range(5):
        sock = shared.open("client")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        sock.bind(("", 777))
        sock.connect((shared.relay, 80))
        assert re.fullmatch(r"[0-9.]+:\d{1,4}", seen := greet(sock))
        assert port_of(seen) < 1024
        sock.close()
