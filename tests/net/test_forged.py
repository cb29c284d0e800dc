"""Packets that nobody in a conversation has sent: what they may bring about, and what not.

Whoever can forge addresses knows them and the ports, but no number of a connection.
"""

import time
from collections.abc import Iterator

import pytest

from tests.net.routed import send, watching
from tests.net.world import World, echo, greet
from tests.tools.packets import template

pytestmark = pytest.mark.net


def unfiltered(world: World) -> None:
    """The relay takes packets with any source from any wire."""
    names = world.run("relay", "sysctl", "-aN", "-r", r"^net\.ipv4\.conf\..*\.rp_filter$").split()
    world.run("relay", "sysctl", "-qw", *(f"{name}=0" for name in names))


@pytest.fixture(scope="module")
def forged(datapath: str) -> Iterator[World]:
    """Relaying, where sources are believed."""
    with World(datapath=datapath) as world:
        world.serve("server", "tcp/80", "tcp/443", "tcp/8443", "udp/7", "udp/53")
        world.begin(services="tcp/80 tcp/443 tcp/8443=forward udp/7 udp/53")
        unfiltered(world)
        yield world


def dropped(world: World, reason: str) -> int:
    return int(world.values("counters").get(f"dropped_{reason}", 0))


# The server as a client


@pytest.mark.parametrize(
    "text",
    ["{S}:7 > {K}:7", "{S}:53 > {K}:53", "{S}:53 > {K}:7", "{S}:443 > {K}:443 [S]",
     "{S}:8443 > {K}:8443 [S]"],
)  # fmt: skip
def test_a_datagram_from_the_servers_own_port_makes_no_loop(forged: World, text: str) -> None:
    before = dropped(forged, "server_itself")
    packet = template(text.format(S=forged.server, K=forged.relay), payload=b"").build()

    with watching(forged, "server", lambda packet: packet[9] in (6, 17)) as watch:
        send(forged, "client", packet)
        with pytest.raises(TimeoutError):
            watch.next(0.3)

    forged.soon(lambda: dropped(forged, "server_itself") == before + 1, "dropped")
    assert forged.flows(f"client={forged.server}") == []


def test_the_server_is_its_own_client_from_any_other_port(forged: World) -> None:
    assert forged.who_udp("server", 7).startswith(forged.relay)
    assert forged.who("server", 80).startswith(forged.relay)
    assert forged.who("server", 8443).startswith(forged.relay)


# The relay's own answers


@pytest.mark.parametrize("what", [{"ttl": 1}, {"payload": bytes(1400)}], ids=["ttl", "size"])
def test_forged_packets_are_answered_by_no_more_errors_than_the_kernel_would(
    world: World, what: dict[str, object]
) -> None:
    world.serve("server", "tcp/80", "udp/7")
    world.begin(services="tcp/80 udp/7")
    unfiltered(world)
    client, wire = world.client, "eth1"
    world.run("relay", "ip", "route", "add", "198.51.0.0/16", "via", client)
    world.run("relay", "ip", "link", "set", wire, "mtu", "1280")
    time.sleep(0.2)
    packets = [
        template(f"198.51.{n // 250}.{n % 250 + 1}:5000 > {world.relay}:7", **what).build()
        for n in range(3000)
    ]
    began, errors = time.monotonic(), 0
    with watching(world, "client", lambda packet: packet[9] == 1) as watch:
        send(world, "client", *packets)
        until = time.monotonic() + 1
        while True:
            try:
                watch.next(0.5 if errors else world.patience)
            except TimeoutError:
                break
            errors += 1
        took = until - 1 - began

    assert 0 < errors <= 50 + 1000 * (took + 1)
    assert errors < 3000 or took > 2
    world.until(lambda: dropped(world, "not_forwarded") == 3000, "all of them dropped")


# Blind packets amid a connection


def forge(world: World, text: str) -> None:
    """Sends a packet with numbers of no connection, from the clients' side."""
    send(world, "client", template(text, payload=b"").build())


@pytest.mark.parametrize("gap", [0.0, 0.3])
@pytest.mark.parametrize("flags", ["F.!", "R!", "R.!", "S.!", ".!"])
@pytest.mark.parametrize("port", [80])
def test_a_connection_outlives_forged_packets_of_both_ends(
    forged: World, port: int, flags: str, gap: float
) -> None:
    sock = forged.connect("client", port)
    greet(sock)
    x = sock.getsockname()[1]
    (flow,) = forged.flows(f"client={forged.client}:{x}")
    y = flow["relay"].partition(":")[2] if flow.get("relay") else x
    client, relay, server = forged.client, forged.relay, forged.server
    for text in (
        f"{client}:{x} > {relay}:{port} [{flags}]",
        f"{server}:{port} > {client}:{y} [{flags}]",
        f"{client}:{x} > {relay}:{port} [S!]",
    ):
        forge(forged, text)
        time.sleep(gap)
    time.sleep(0.05)

    echo(sock, b"two")
    forged.until(
        lambda: [each["state"] for each in forged.flows(f"client={client}:{x}")] == ["established"],
        "one connection",
    )
    sock.close()
