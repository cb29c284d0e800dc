"""Ports that are free again while flows remember them: whose they are, and who may not use them.

A local user without any privilege takes the relay port of a connection that is over.
"""

import contextlib
import errno
import re
import signal
import socket
from collections.abc import Iterator

import pytest

from tests.net.world import World, greet

pytestmark = pytest.mark.net


@contextlib.contextmanager
def seized(world: World, port: int, kind: socket.SocketKind) -> Iterator[socket.socket]:
    """A socket of somebody's on the relay's host, with this port."""
    with world.lab.enter("relay"), socket.socket(socket.AF_INET, kind) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.settimeout(3)
        world.until(lambda: is_bound(sock, world.relay, port), "the port free")
        yield sock


def is_bound(sock: socket.socket, host: str, port: int) -> bool:
    """Whether the port was free: krelay lets go of a dead tcp-relay's listening socket apart."""
    try:
        sock.bind((host, port))
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def relay_port(world: World, client: socket.socket) -> int:
    """The relay port of a client's flow."""
    host, port = client.getsockname()
    (flow,) = world.flows(f"client={host}:{port}")
    return int(flow["relay"].partition(":")[2])


def seen_from(world: World, port: int, server_port: int = 80) -> str:
    """Whom the server sees when that port is connected to it; nobody, where it can't be."""
    with seized(world, port, socket.SOCK_STREAM) as sock:
        try:
            sock.connect((world.server, server_port))
        except OSError:
            return "nobody"
        return greet(sock)


def begin(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    world.begin(services="tcp/80 udp/7")


@pytest.mark.parametrize("first", ["client", "server"])
def test_after_a_connection_its_port_speaks_for_who_has_it(shared: World, first: str) -> None:
    """Where the server closes first, no TIME_WAIT holds the port."""
    for _ in range(3):
        client = shared.connect("client", 80)
        if first == "server":
            client.sendall(b"download 1 100 0\n")
            while client.recv(4096):
                pass
        else:
            greet(client)
        port = relay_port(shared, client)
        client.close()
        shared.until(lambda: shared.flows("state=closed"), "closed")

        assert not seen_from(shared, port).startswith(shared.client)
    assert shared.who("client", 80).startswith(shared.client)


def test_after_tcp_relays_death_its_ports_speak_for_who_has_them(world: World) -> None:
    begin(world)
    clients = [world.connect("client", 80) for _ in range(3)]
    for client in clients:
        greet(client)
    ports = [relay_port(world, client) for client in clients]
    world.kill(world.tcp_relay_process)

    for port in ports:
        seen = seen_from(world, port)
        assert seen == "nobody" or seen.startswith(f"{world.relay}:{port}"), seen


def test_while_krelay_stands_still_its_maps_take_nobody_for_a_dead_connection(
    world: World,
) -> None:
    """What the kernel was handed it goes on rewriting, whoever has died meanwhile."""
    begin(world)
    client = world.connect("client", 80)
    greet(client)
    port = relay_port(world, client)
    world.krelay_process.signal(signal.SIGSTOP)
    try:
        world.kill(world.tcp_relay_process)
        assert not seen_from(world, port).startswith(world.client)
    finally:
        world.krelay_process.signal(signal.SIGCONT)


def test_a_late_answer_of_the_server_reaches_nobody_who_has_taken_the_port(world: World) -> None:
    begin(world)
    client = world.connect("client", 80)
    greet(client)
    port = relay_port(world, client)
    world.kill(world.tcp_relay_process)
    with seized(world, port, socket.SOCK_STREAM) as sock:
        sock.listen()
        with world.lab.enter("server"), socket.socket() as server:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            server.settimeout(2)
            with contextlib.suppress(OSError):
                server.bind((world.server, 80))
                server.connect((world.client, port))
        sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            sock.accept()


@pytest.mark.parametrize("source", ["client", "relay"])
def test_a_local_users_datagrams_are_his_own_whatever_port_a_flow_has(
    shared: World, source: str
) -> None:
    shared.put(source=source)
    with shared.open("client", socket.SOCK_DGRAM) as client:
        seen = shared.exchange(client, b"who", (shared.relay, 7)).decode().strip()
        port = int(seen.partition(":")[2])
        with seized(shared, port, socket.SOCK_DGRAM) as local:
            local.sendto(b"who", (shared.server, 7))
            answer, peer = local.recvfrom(4096)
            assert peer == (shared.server, 7)
            assert answer.decode().startswith(shared.relay)
            if source == "relay":
                assert answer.decode().strip() != seen
            for word in (b"one", b"two"):
                assert shared.exchange(client, word, (shared.relay, 7)) == word
            local.settimeout(0.2)
            with pytest.raises(TimeoutError):
                local.recvfrom(4096)


def test_the_gateway_port_without_tcp_relay_reaches_no_client(world: World) -> None:
    """Nobody else may call a client from it in the service's name."""
    begin(world)
    client = world.connect("client", 80)
    greet(client)
    x = client.getsockname()[1]
    gport = int(re.search(r"gport=(\d+)", world.read("status/applied"))[1])  # type: ignore[index]
    world.kill(world.tcp_relay_process)
    with contextlib.suppress(ConnectionResetError):
        assert client.recv(1) == b""  # who ends second has no TIME_WAIT that keeps the port
    client.close()
    with world.lab.enter("client"), socket.socket() as waiting:
        waiting.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        world.until(lambda: is_bound(waiting, world.client, x), "the port, free")
        waiting.listen()
        waiting.settimeout(1)
        with seized(world, gport, socket.SOCK_STREAM) as sock:
            sock.settimeout(1)
            with pytest.raises(TimeoutError):
                sock.connect((world.client, x))
