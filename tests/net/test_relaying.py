"""Relaying as users know it: HTTP, DNS and bulk data, with addresses and ports of their own.

KRELAY_LONG=1 has four times as much of the bulk.
"""

import hashlib
import os
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from krelay_vm import Program
from tests.net.programs.server import digest, send_blob
from tests.net.world import World, upload

pytestmark = pytest.mark.net

MB = 1 << 20
LONG = bool(os.environ.get("KRELAY_LONG"))
BULK, OF_EACH = (200 * MB, 2 * MB) if LONG else (50 * MB, MB // 2)
"""Bytes of a connection alone, and of one of fifty."""

LOSSY = """
table ip lossy {
  chain in { type filter hook prerouting priority -500;
    meta iifname "lo" return; numgen random mod 100 < 2 counter drop;
  }
}
"""

DEAF = """
table ip deaf {
  chain in {
    type filter hook prerouting priority -500; policy drop;
  }
}
"""


@contextmanager
def lossy(world: World, *hosts: str) -> Iterator[None]:
    """Two in a hundred packets that reach these hosts are lost; that some were is checked."""
    for host in hosts:
        world.nft(host, LOSSY)
    yield
    for host in hosts:
        shown = world.lab.run(host, "nft", "list", "table", "ip", "lossy").stdout
        assert "counter packets 0 " not in shown
        world.lab.run(host, "nft", "delete", "table", "ip", "lossy")


def servers(world: World) -> tuple[Program, Program]:
    """Of the shared world: our server on the first host, and on the second."""
    first, second = world.lab.programs[:2]
    return first, second


def dig(world: World, names: list[str], port: int) -> list[str]:
    """What `dig` answers for each of these names."""
    batch = world.lab.directory / "names"
    batch.write_text("".join(f"{name} A\n" for name in names))
    command = ("dig", f"@{world.relay}", "-p", str(port), "+short", "+tries=1", "+time=5")
    return world.lab.run("client", *command, "-f", str(batch), timeout=60).stdout.split()


def test_200_requests_and_200_queries_come_from_the_client_with_files_changed_while_running(
    world: World,
) -> None:
    records = {f"n{i}.example": f"10.9.{i // 250}.{1 + i % 250}" for i in range(200)}
    access = world.nginx("server", 8080, 8443)
    dns = world.dnsmasq("server", 5353, records)
    world.begin(services="tcp/80 udp/53", gport=16000)
    world.put(start=1)
    world.put(services="tcp/8080 udp/5353 tcp/8443")
    world.put(gport=18000)

    paths = "".join(f"/path/{i}\n" for i in range(200))
    for port in (8080, 8443):
        url = f"http://{world.relay}:{port}/path/[0-199]"
        curl = ("curl", "-sS", "-m", "5", "-H", "Connection: close", url)
        assert world.lab.run("client", *curl, timeout=60).stdout == paths
    assert dig(world, list(records), 5353) == list(records.values())

    seen = [line.split() for line in access.read_text().splitlines()]
    expected = [[world.client, p, f"/path/{i}"] for p in ("8080", "8443") for i in range(200)]
    assert seen == expected
    for name in records:
        assert f"query[A] {name} from {world.client}" in dns.output
    flows = world.flows("proto=tcp")
    assert len(flows) == 400
    assert {flow["gport"] for flow in flows} == {18000}
    old = world.lab.run("client", "curl", "-sS", "-m", "5", f"http://{world.relay}/", check=False)
    assert old.status == 7  # refused: tcp/80 is no service any more


def test_a_new_server_gets_new_connections_while_a_download_from_the_first_goes_on(
    shared: World,
) -> None:
    world = shared
    second = world.lab.address("server2")
    slow = world.download("client", 80, seed=1, size=4 * MB, rate=2 * MB)
    with world.open("client", socket.SOCK_DGRAM) as talking:
        world.exchange(talking, b"hello", (world.relay, 7))
        world.put(real_ip=second)

        assert world.who("client", 80).startswith(f"{world.client}:")
        assert world.who_udp("client", 7).startswith(f"{world.client}:")
        world.exchange(talking, b"hello", (world.relay, 7))
        assert not slow.is_over
        assert {r["server"] for r in world.flows("proto=tcp state=established")} >= {
            f"{world.server}:80"
        }
        flows = {r["client"]: r["server"] for r in world.flows("proto=udp")}
        assert flows[f"{world.client}:{talking.getsockname()[1]}"] == f"{world.server}:7"
    slow.finish()

    first, other = servers(world)
    assert world.logged(first).count("tcp 80") == 1
    assert world.logged(other).count(f"tcp 80 {world.client}") == 1


def test_unanswered_datagrams_go_to_the_new_server_at_once(shared: World) -> None:
    world = shared
    world.nft("server", DEAF)
    sock = world.open("client", socket.SOCK_DGRAM)
    sock.sendto(b"lost", (world.relay, 7))
    world.until(lambda: world.flows("state=unreplied"), "an unreplied row")
    world.put(real_ip=world.lab.address("server2"))

    assert world.exchange(sock, b"heard", (world.relay, 7)) == b"heard"


def test_bulk_arrives_intact_each_way(shared: World) -> None:
    world = shared
    world.download("client", 80, seed=2, size=BULK).finish()
    upload(world.connect("client", 80), 3, BULK)


@pytest.mark.slow
def test_bulk_arrives_intact_each_way_though_packets_are_lost(shared: World) -> None:
    world = shared
    with lossy(world, "client", "server"):
        world.download("client", 80, seed=4, size=BULK).finish()
        upload(world.connect("client", 80), 5, BULK)


def both_ways(world: World, seed: int, size: int) -> None:
    """Sends and takes at once, and checks both."""
    with world.connect("client", 80) as sock, ThreadPoolExecutor(1) as sender:
        sock.settimeout(60)
        sock.sendall(f"both {seed} {size}\n".encode())

        def send() -> None:
            send_blob(sock, seed + 1000, size)
            sock.shutdown(socket.SHUT_WR)

        sending = sender.submit(send)
        with sock.makefile("rb") as answer:
            got = answer.read()
        sending.result()
    receipt = f"{size} {digest(seed + 1000, size)}\n".encode()
    assert got[size:] == receipt
    assert hashlib.sha256(got[:size]).hexdigest() == digest(seed, size)


@pytest.mark.parametrize(("loss", "size"), [(False, OF_EACH), (True, OF_EACH // 2)])
def test_fifty_connections_at_once_each_keep_their_own_content(
    shared: World, loss: bool, size: int
) -> None:
    world = shared
    with lossy(world, *(("client", "server") if loss else ())), ThreadPoolExecutor(50) as many:
        list(many.map(lambda seed: both_ways(world, seed, size), range(50)))
    assert world.logged(servers(world)[0]).count(f"tcp 80 {world.client} ") == 50
