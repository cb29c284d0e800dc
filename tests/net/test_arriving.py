"""Addresses that arrive while clients are trying: what the rules call local is relayed at once, and
what began with an address or a network that is no more begins again."""

import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.net.conftest import SharedWorlds, prepared_world
from tests.net.world import World, echo, greet

pytestmark = pytest.mark.net

SERVICES = "tcp/80 tcp/443=forward udp/7 udp/53"
DATAGRAM = socket.SOCK_DGRAM
PREFIX = "198.51.100"
CHANGES = 5


@pytest.fixture(scope="module")
def shared_worlds(datapath: str) -> Iterator[SharedWorlds]:
    with SharedWorlds(
        lambda: prepared_world(datapath, lambda world: world.put(services=SERVICES))
    ) as worlds:
        yield worlds


@pytest.fixture
def arriving(shared: World) -> Iterator[World]:
    """The shared world, whose relay may be given addresses that begin with PREFIX."""
    yield shared
    ip(shared, "addr", "flush", "dev", "eth0", "to", f"{PREFIX}.0/24")
    ip(shared, "route", "flush", "table", "local", "exact", f"{PREFIX}.0/24")


def serve(world: World, source: str = "client") -> None:
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    world.begin(services=SERVICES, source=source)


def ip(world: World, *words: str) -> None:
    world.lab.run("relay", "ip", *words)


def renumber(world: World, old: str, new: str) -> None:
    """The relay's address towards the server is another; it keeps the others of the same subnet."""
    world.lab.run("relay", "sysctl", "-qw", "net.ipv4.conf.all.promote_secondaries=1")
    ip(world, "addr", "add", f"{new}/24", "dev", "eth1")
    ip(world, "addr", "del", f"{old}/24", "dev", "eth1")


@pytest.mark.parametrize("source", ["client", "relay"])
def test_an_address_that_arrives_is_relayed_at_once(arriving: World, source: str) -> None:
    world = arriving
    world.put(source=source)
    for number in range(20):
        address = f"{PREFIX}.{number}"
        ip(world, "addr", "add", f"{address}/32", "dev", "eth0")
        match number % 4:
            case 0:
                assert world.who("client", 80, to=address)
            case 1:
                assert world.who("client", 443, to=address)
            case 2:
                assert world.who_udp("client", 7, to=address)
            case 3:
                assert world.who_udp("client", 53, to=address)
    counters = world.counted()
    assert not any(name.startswith("dropped_") and counters[name] for name in counters), counters


def test_no_connection_to_tcp_relay_itself_at_an_arriving_address(arriving: World) -> None:
    world = arriving
    port = int(world.read("gport"))
    for number in range(10):
        address = f"{PREFIX}.{number}"
        ip(world, "addr", "add", f"{address}/32", "dev", "eth0")
        with pytest.raises(ConnectionRefusedError):
            world.connect("client", port, to=address)
    world.soon(lambda: world.counted().get("dropped_gateway_port") == 10, "refused")


def test_networks_that_are_local_by_a_route_are_relayed(world: World) -> None:
    serve(world)
    ip(world, "route", "add", "local", f"{PREFIX}.0/24", "dev", "lo")
    for number in range(1, 6):
        address = f"{PREFIX}.{number}"
        assert world.who("client", 80, to=address).startswith(world.client)
        assert world.who("client", 443, to=address).startswith(world.client)
        assert world.who_udp("client", 7, to=address).startswith(world.client)
        assert world.who_udp("client", 53, to=address).startswith(world.client)
    with pytest.raises(ConnectionRefusedError):
        world.connect("client", int(world.read("gport")), to=f"{PREFIX}.9")
    with world.connect("client", 80, to=f"{PREFIX}.7") as sock:
        greet(sock)
        world.kill(world.krelay_process)
        world.start_krelay()
        world.until_state("running")
        world.until(lambda: world.flows("state=established"), "resumed")
        echo(sock, b"and it goes on")


def test_a_server_within_a_local_network_is_refused(arriving: World) -> None:
    world = arriving
    ip(world, "route", "add", "local", f"{PREFIX}.0/24", "dev", "lo")
    world.write("real_ip", f"{PREFIX}.9")
    world.until(lambda: f"{PREFIX}.9 is an address of this host" in world.read("status/errors"), "")
    world.until(lambda: world.read("real_ip") == world.server, "the value in force in its file")


@pytest.mark.parametrize("nonlocal_bind", [0, 1])
@pytest.mark.parametrize("source", ["client", "relay"])
def test_connections_begin_from_the_new_address_at_once(
    world: World, source: str, nonlocal_bind: int
) -> None:
    """The address towards the server is replaced; keepalived's hosts may bind what they don't have
    yet, or any more."""
    world.lab.run("relay", "sysctl", "-qw", f"net.ipv4.ip_nonlocal_bind={nonlocal_bind}")
    world.lab.run("relay", "sysctl", "-qw", "net.ipv4.conf.eth1.proxy_arp=1")
    serve(world, source)
    towards_clients = world.lab.address("relay", towards="client")
    world.lab.run("server", "ip", "route", "replace", "default", "dev", "eth0")
    assert world.who("client", 80, to=towards_clients)
    old, results, ends = world.relay, Counter[str](), threading.Event()

    def connect() -> None:
        while not ends.is_set():
            sock = world.open("client")
            sock.settimeout(5)
            try:
                sock.connect((towards_clients, 80))
                greet(sock)
                results["ok"] += 1
            except (OSError, AssertionError) as error:
                results[type(error).__name__] += 1
            finally:
                sock.close()
            time.sleep(0.02)

    thread = threading.Thread(target=connect)
    thread.start()
    for number in range(CHANGES):
        new = old.rsplit(".", 1)[0] + f".{100 + number}"
        before = results["ok"]
        renumber(world, old, new)
        old = new
        world.until(lambda b=before: results["ok"] > b + 20, "connections after a change")  # type: ignore[misc]
    ends.set()
    thread.join()
    # What is under way has lost its address, and for a moment the kernel has no route.
    assert sum(results.values()) - results["ok"] <= 2 * CHANGES, results
    assert "no address of this host" not in world.tcp_relay_process.output


@pytest.mark.parametrize("to", [7, 443])
def test_flows_of_an_address_that_is_gone_begin_again(world: World, to: int) -> None:
    """With source=relay the server would answer an address that nobody has."""
    serve(world, "relay")
    towards_clients = world.lab.address("relay", towards="client")
    new = world.relay.rsplit(".", 1)[0] + ".100"
    sock = world.open("client", DATAGRAM)
    sock.bind(("", 4000))
    assert world.exchange(sock, b"who", (towards_clients, 7)).decode().startswith(world.relay)
    renumber(world, world.relay, new)
    if to == 443:
        assert world.who("client", 443, to=towards_clients).startswith(new)
        return
    sock.settimeout(0.3)

    def answered() -> bytes | None:
        sock.sendto(b"who", (towards_clients, 7))
        try:
            return sock.recv(100)
        except TimeoutError:
            return None

    assert world.until(answered, "an answer to the new address").startswith(new.encode())


def test_clients_that_turn_out_to_be_beside_the_server_are_answered(world: World) -> None:
    """The server answers them directly, so it must see the relay: also in flows that began before
    the relay had an address in their network."""
    neighbour = world.lab.address("neighbour")
    narrow = f"{world.relay}/28"
    ip(world, "addr", "add", narrow, "dev", "eth1")
    ip(world, "addr", "del", f"{world.relay}/24", "dev", "eth1")
    ip(world, "addr", "replace", narrow, "dev", "eth1")
    ip(world, "route", "add", f"{neighbour}/32", "dev", "eth1")
    serve(world)
    sock = world.open("neighbour", DATAGRAM)
    sock.bind(("", 4000))
    sock.connect((world.relay, 7))
    sock.settimeout(0.3)
    sock.send(b"who")
    with pytest.raises(TimeoutError):
        sock.recv(100)
    world.until(lambda: [flow["source"] for flow in world.flows()] == ["client"], "a row")
    ip(world, "addr", "add", world.relay.rsplit(".", 1)[0] + ".100/24", "dev", "eth1")

    def answered() -> bytes | None:
        sock.send(b"who")
        try:
            return sock.recv(100)
        except TimeoutError:
            return None

    assert world.until(answered, "an answer").startswith(b"10.77.3.")
    assert [flow["source"] for flow in world.flows()] == ["relay"]


@pytest.mark.one_datapath("a port is chosen by the worker")
def test_ports_that_are_reserved_later_are_not_taken() -> None:
    with World() as world:
        serve(world, "relay")
        assert world.who_udp("client", 7, bind=4001).endswith(":4001")
        world.lab.run("relay", "sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=4000-4100")
        ports = iter(range(4003, 4100))

        def is_avoided() -> bool:
            port = next(ports)
            return not world.who_udp("client", 7, bind=port).endswith(f":{port}")

        world.until(is_avoided, "what is reserved, which is looked at every second")
