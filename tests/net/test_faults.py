"""Processes that are killed, and what becomes of the conversations they had in hand."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.net.world import GPORT, Download, World, control_socket, doubled, echo, greet

pytestmark = pytest.mark.net

MB = 1 << 20
DOWN = 8080
"""A port at which the server serves nothing."""


@contextmanager
def never_without_rules(world: World) -> Iterator[None]:
    """Datagrams without pause: one that meets no rule is refused by the relay host itself."""
    ended = threading.Event()
    refused: list[str] = []
    sock = world.open("client2", socket.SOCK_DGRAM)
    sock.connect((world.relay, 7))
    sock.setblocking(False)

    def ask() -> None:
        while not ended.wait(0.0002):
            try:
                sock.send(b"now?")
                while sock.recv(10):
                    pass
            except BlockingIOError:
                pass
            except ConnectionRefusedError as error:
                refused.append(str(error))

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert not refused, f"{len(refused)} times"


@contextmanager
def nothing_unrewritten(world: World, *, source: str = "client") -> Iterator[None]:
    """Every packet that reaches the hosts is looked at, by rules that only count."""
    K, S, C = world.relay, world.server, world.client
    client: dict[str, str] = {
        "T2 missed": f"ip saddr {K} tcp sport {GPORT}",
        "T4 missed": f"ip saddr {S} tcp sport 80",
        "U3 missed": f"ip saddr {S} udp sport 7",
        "fine": f"ip saddr {K} tcp sport 80",
    }
    server = {
        "T3 missed": f"ip saddr {K if source == 'client' else C} tcp dport 80",
        "U2 missed": f"ip saddr {K if source == 'client' else C} udp dport 7",
        "to the gateway": f"tcp dport {GPORT}",
        "fine": f"ip saddr {C if source == 'client' else K} tcp dport 80",
    }
    for host, rules in (("client", client), ("server", server)):
        counters = "\n".join(f'{rule} counter comment "{name}"' for name, rule in rules.items())
        chain = f"type filter hook prerouting priority -400\n{counters}"
        world.nft(host, f"table ip watch {{\nchain in {{\n{chain}\n}}\n}}\n")
    yield
    for host in ("client", "server"):
        shown = world.lab.run(host, "nft", "list", "table", "ip", "watch").stdout.splitlines()
        counted = [line for line in shown if "comment" in line]
        assert len(counted) == 4
        for line in counted:
            assert ("packets 0 bytes 0" in line) == ("fine" not in line), line
        world.lab.run(host, "nft", "delete", "table", "ip", "watch")


def under_way(world: World, download: Download, more: int = MB) -> None:
    """Waits until some more of it has come."""
    least = download.received + more
    world.until(lambda: download.received >= least, f"{least} bytes")


def revive(world: World) -> None:
    """krelay again, after it was killed; until tcp-relay has come back to it."""
    world.start_krelay()
    world.until(lambda: world.values("status")["tcp_relays"], "tcp-relay back")


@pytest.mark.parametrize("source", ["client", "relay"])
def test_tcp_goes_on_when_krelay_was_killed_and_nothing_passes_unrewritten(
    world: World, source: str
) -> None:
    world.serve("server", "tcp/80", "tcp/443", "udp/7")
    world.begin(source=source)
    idle = [world.connect(host, port) for host in ("client", "client2") for port in (80, 443)]
    seen = [greet(sock) for sock in idle]
    half_closed = world.connect("client", 80)
    half_closed.sendall(b"download 9 3000000 600000\n")
    half_closed.shutdown(socket.SHUT_WR)
    datagrams = world.open("client", socket.SOCK_DGRAM)
    world.exchange(datagrams, b"before", (world.relay, 7))

    with nothing_unrewritten(world, source=source):
        slow = world.download("client", 80, seed=5, size=24 * MB, rate=6 * MB)
        under_way(world, slow)
        in_kernel = world.in_kernel
        world.kill(world.krelay_process)
        datagrams.sendto(b"lost", (world.relay, 7))
        stood = slow.received
        if in_kernel:
            world.until(lambda: slow.received > stood + MB, "the download goes on by itself")
        else:
            world.until(lambda: _stands_still(world, slow), "the download stands still")
        assert not slow.is_over
        revive(world)
        stood = slow.received
        world.until(lambda: slow.received > stood + MB, "the download goes on")
        slow.finish()

    for sock in idle:
        echo(sock, b"still here")
    flows = {flow["client"]: flow for flow in world.flows("proto=tcp state=established")}
    for sock, address in zip(idle, seen, strict=True):
        flow = flows["{}:{}".format(*sock.getsockname())]
        host = flow["client"] if source == "client" else flow["relay"]
        assert address == f"{host.split(':')[0]}:{flow['relay'].split(':')[1]}"
        assert flow["source"] == source
    got = b"".join(iter(lambda: half_closed.recv(MB), b""))
    assert len(got) == 3_000_000
    datagrams.settimeout(10)
    assert world.exchange(datagrams, b"after", (world.relay, 7)) in (b"after", b"lost")
    assert world.read("status/state") == "running"
    assert world.who("client", 80)


def _stands_still(world: World, download: Download) -> bool:
    """Whether nothing comes for a fifth of a second: what was in flight has landed."""
    before = download.received
    try:
        world.until(lambda: download.received != before, "more", 0.2)
    except Exception:
        return True
    return False


def test_killing_krelay_twice_in_one_download_leaves_it_intact(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    world.begin()
    first = world.rules()
    with nothing_unrewritten(world), never_without_rules(world):
        slow = world.download("client", 80, seed=6, size=20 * MB, rate=5 * MB)
        for _ in range(2):
            under_way(world, slow)
            world.kill(world.krelay_process)
            revive(world)
        slow.finish()
    assert world.rules() == first
    assert not doubled(first)


def test_new_connections_in_the_gap_are_served_when_krelay_is_back(world: World) -> None:
    world.serve("server", "tcp/80")
    world.begin()
    world.kill(world.krelay_process)
    early = world.open("client")
    early.setblocking(False)
    early.connect_ex((world.relay, 80))
    revive(world)
    early.settimeout(10)

    assert greet(early).startswith(f"{world.client}:")


def test_killing_tcp_relay_resets_a_running_download_so_that_its_end_is_no_end(
    world: World,
) -> None:
    world.serve("server", "tcp/80")
    world.begin()
    slow = world.download("client", 80, seed=7, size=20 * MB, rate=5 * MB)
    under_way(world, slow)
    world.kill(world.tcp_relay_process)

    assert isinstance(slow.join(), ConnectionResetError)


def test_killing_tcp_relay_resets_both_ends_and_leaves_udp_alone(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    world.dnsmasq("server", 53, {"www.example": "10.9.8.7"})
    world.begin()
    dig = ("dig", f"@{world.relay}", "+short", "+tries=1", "+time=3", "www.example")
    idle = world.connect("client", 80)
    server_leg = greet(idle)
    datagrams = world.open("client", socket.SOCK_DGRAM)
    world.exchange(datagrams, b"before", (world.relay, 7))
    ss = ("ss", "-Htn", "state", "established", "dst", server_leg)
    assert world.lab.run("server", *ss).stdout

    world.kill(world.tcp_relay_process)
    with pytest.raises(ConnectionResetError):
        idle.recv(1)
    world.until(lambda: not world.lab.run("server", *ss).stdout, "the server's end reset")
    assert world.exchange(datagrams, b"during", (world.relay, 7)) == b"during"
    assert world.lab.run("client", *dig).stdout == "10.9.8.7\n"
    for _ in range(3):
        with pytest.raises(ConnectionRefusedError):
            world.connect("client", 80)
    world.until(lambda: not world.flows("proto=tcp state=established"), "the rows end")

    world.start_tcp_relay()
    assert world.who("client", 80).startswith(f"{world.client}:")
    assert world.exchange(datagrams, b"after", (world.relay, 7)) == b"after"


@pytest.mark.parametrize("number", [15, 2], ids=["TERM", "INT"])
def test_krelay_asked_to_end_leaves_the_host_as_before(world: World, number: int) -> None:
    world.serve("server", "tcp/80", "udp/7")
    before = world.rules()
    world.begin()
    idle = world.connect("client", 80)
    greet(idle)
    world.who_udp("client", 7)
    assert world.rules() != before

    world.krelay_process.signal(number)
    assert world.krelay_process.wait() == (0 if number == 15 else 130)
    assert world.rules() == before
    assert not (world.root / "control.sock").exists()
    assert not (world.root / "relay.sock").exists()
    with pytest.raises(ConnectionResetError):
        idle.recv(1)
    with pytest.raises(ConnectionRefusedError):
        world.connect("client", 80)
    assert world.read("status/state") == "stopped"
    with pytest.raises(OSError, match="No such file"), control_socket(world.root):
        pass


def _who(world: World) -> bytes:
    with world.connect("client", DOWN) as sock:
        return sock.recv(1)


def test_a_tcp_client_of_a_server_that_is_down_learns_it_promptly(shared: World) -> None:
    shared.put(services=f"tcp/{DOWN} udp/{DOWN}")

    with pytest.raises(ConnectionResetError):  # while connecting, or just after
        _who(shared)


def test_a_udp_client_of_a_server_that_is_down_gets_its_error(shared: World) -> None:
    shared.put(services=f"tcp/{DOWN} udp/{DOWN}")

    sock = shared.open("client", socket.SOCK_DGRAM)
    sock.connect((shared.relay, DOWN))
    sock.send(b"anybody?")
    with pytest.raises(ConnectionRefusedError):
        sock.recv(1)  # ICMP 3/3 from the address and port that were asked, or it isn't for us


def test_tcp_relay_asked_to_end_drains_and_asked_again_resets_its_connections(
    world: World,
) -> None:
    world.serve("server", "tcp/80")
    world.begin()
    idle = world.connect("client", 80)
    greet(idle)
    world.tcp_relay_process.terminate()
    world.lab.wait(lambda: "draining" in world.tcp_relay_process.output, "draining")
    greet(idle)  # it goes on
    world.tcp_relay_process.terminate()

    assert world.tcp_relay_process.wait() == 0
    with pytest.raises(ConnectionResetError):
        idle.recv(1)
