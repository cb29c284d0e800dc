"""Floods that fill the table, of flows that a server answers: who is served meanwhile and after.

Limits are low here, so that each flood is short; KRELAY_LONG=1 is a table of the usual size.
"""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from krelay.nat.admission import TRIMMED
from tests.net.conftest import SharedWorlds, prepared_world
from tests.net.programs import flood
from tests.net.test_learning import does_visit
from tests.net.world import PATIENCE, PYTHON, World, echo, greet

pytestmark = pytest.mark.net

LONG = bool(os.environ.get("KRELAY_LONG"))
FLOWS, OF_CLIENT = (65536, 4096) if LONG else (800, 100)
RATE = 3000 if LONG else 2000
"""Packets of a flood a second."""
SHORT = 4.0 if LONG else 0.9
"""Seconds for datagrams that may be refused, where nothing may tell."""
ONCE = """table ip once {
 set seen { typeof tcp sport . tcp sequence; flags dynamic; size 65535; }
 chain out {
  type filter hook output priority 0;
  ip saddr OWN tcp flags & (syn | ack) == syn tcp sport . tcp sequence @seen drop
  ip saddr OWN tcp flags & (syn | ack) == syn add @seen { tcp sport . tcp sequence }
 }
}
"""
"""A SYN that is lost is not sent again: it fails, however long an answer may take."""
FORGED = "10.128.0.0/9"
ECHO, DNS, RELAYED, FORWARDED = 7, 53, 80, 443
SERVICES = f"tcp/{RELAYED} tcp/{FORWARDED}=forward udp/{ECHO} udp/{DNS}"
ALL = {"tcp": True, "forwarded": True, "udp": True, "query": True}


def prepare(world: World) -> None:
    """What is sent to forged addresses ends at client2, which forges them."""
    way = world.lab.address("client2")
    for host, towards in (("relay", way), ("server", world.relay)):
        world.lab.run(host, "ip", "route", "replace", FORGED, "via", towards)
    every = "for link in /proc/sys/net/ipv4/conf/*; do echo 0 > $link/rp_filter; done"
    world.lab.run("relay", "sh", "-c", every)
    world.put(services=SERVICES, limits__flows=FLOWS, limits__flows_per_client=OF_CLIENT)


def send_once(world: World) -> None:
    """No SYN of the clients' own is sent again."""
    for host in () if LONG else ("client", "client2"):
        world.nft(host, ONCE.replace("OWN", world.lab.address(host)))


@pytest.fixture(scope="module")
def shared_worlds(datapath: str) -> Iterator[SharedWorlds]:
    with SharedWorlds(lambda: prepared_world(datapath, prepare)) as worlds:
        yield worlds


@contextmanager
def undisturbed(world: World) -> Iterator[World]:
    """With a connection and datagrams of a client that no flood may disturb."""
    send_once(world)
    with world.connect("client", RELAYED) as tcp, world.open("client", socket.SOCK_DGRAM) as udp:
        assert greet(tcp).startswith(f"{world.client}:")
        for text in (b"first", b"again"):
            world.exchange(udp, text, (world.relay, ECHO))
        yield world
        echo(tcp, b"undisturbed")
        world.exchange(udp, b"undisturbed", (world.relay, ECHO))
    assert world.values("counters")["errors"] == 0


@pytest.fixture
def live(shared: World) -> Iterator[World]:
    """The shared world, which relays."""
    with undisturbed(shared):
        yield shared


@pytest.fixture
def of_its_own(world: World) -> Iterator[World]:
    """The same in a new one, for a warning that is said once in a while."""
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    world.begin()
    prepare(world)
    with undisturbed(world):
        yield world


def forge(world: World, kind: str, port: int, count: int, clients: int, first: str = "") -> None:
    """A flood from client2, of `clients` addresses."""
    words = (kind, world.relay, port, count, RATE, clients, first or flood.FIRST)
    world.lab.run("client2", *PYTHON, "-I", "-S", flood.__file__, *map(str, words), timeout=120)
    world.until(lambda: not world.values("status")["queue_waiting"], "all handled")


def served(world: World, host: str = "client", within: float = PATIENCE) -> dict[str, bool]:
    """Which services a client gets, of those that it hasn't used; each is asked for once.

    `within`: for answers to datagrams.
    """
    found = {}
    for name, port in (("tcp", RELAYED), ("forwarded", FORWARDED)):
        with world.open(host) as sock:
            sock.settimeout(SHORT if LONG else PATIENCE)
            try:
                sock.connect((world.relay, port))
                found[name] = bool(greet(sock))
            except OSError:
                found[name] = False
    for name, port in (("udp", ECHO), ("query", DNS)):
        with world.open(host, socket.SOCK_DGRAM) as sock:
            sock.settimeout(within)
            sock.connect((world.relay, port))
            try:
                sock.send(b"hello")
                found[name] = sock.recv(10) == b"hello"
            except OSError:
                found[name] = False
    return found


@pytest.mark.parametrize(
    ("kind", "port"),
    [("udp", ECHO), ("udp", DNS), ("syn", RELAYED), ("syn", FORWARDED)],
    ids=["datagrams", "queries", "syns", "forwarded-syns"],
)
def test_a_flood_that_is_answered_keeps_nobody_out(of_its_own: World, kind: str, port: int) -> None:
    live = of_its_own
    forge(live, kind, port, 2 * FLOWS, 2 * FLOWS)
    assert served(live) == ALL
    assert served(live, "client2") == ALL
    counters, status = live.values("counters"), live.values("status")
    assert status["flows"] <= FLOWS
    assert counters["dropped_table_full"] == counters["dropped_client_full"] == 0
    assert counters["evicted"] == counters["ended_early"] > FLOWS // 2
    assert status["flows_unconfirmed"] > 0
    live.until(
        lambda: any("unconfirmed flows are evicted" in p.output for p in live.lab.programs),
        "the log says so",
    )


@pytest.mark.parametrize(
    ("kind", "port"),
    [("udp", ECHO), ("udp", DNS), ("syn", RELAYED), ("syn", FORWARDED)],
    ids=["datagrams", "queries", "syns", "forwarded-syns"],
)
def test_a_flood_in_a_clients_name_keeps_it_from_nothing(live: World, kind: str, port: int) -> None:
    silent = "table ip silent { chain out { type filter hook output priority 0;\n"
    live.nft("client", silent + " icmp type 3 drop\n tcp flags rst drop\n }\n}\n")
    forge(live, kind, port, 5 * OF_CLIENT, 1, live.client)
    assert served(live) == ALL
    assert served(live, "client2") == ALL
    counters = live.counted()
    assert counters["dropped_client_full"] == 0
    assert counters["evicted"] > OF_CLIENT


def test_what_a_forger_confirms_leaves_connections_their_places(live: World) -> None:
    """A second datagram from each address, after the answer to the first."""
    for _ in range(2):
        forge(live, "udp", ECHO, FLOWS, FLOWS)
        served(live, "client2", SHORT)  # the answers are through
    for _ in range(2):
        found = served(live, within=SHORT)
        assert (found["tcp"], found["forwarded"]) == (True, True)
    assert live.values("status")["flows_udp"] <= FLOWS - FLOWS // 4


def test_what_a_forger_confirms_in_a_clients_name_leaves_its_connections(live: World) -> None:
    for _ in range(2):
        forge(live, "udp", ECHO, OF_CLIENT, 1, live.client)
        served(live, "client2", SHORT)
    assert served(live, within=SHORT)["tcp"]
    assert served(live, "client2") == ALL


@pytest.mark.parametrize("setting", ["limits__flows", "limits__flows_per_client"])
@pytest.mark.parametrize(
    ("kind", "port"), [("udp", ECHO), ("udp", DNS), ("syn", RELAYED)],
    ids=["datagrams", "queries", "syns"],
)  # fmt: skip
def test_a_limit_lowered_in_a_flood_serves_newcomers_at_once(
    live: World, kind: str, port: int, setting: str
) -> None:
    one = setting == "limits__flows_per_client"
    first, clients = (live.client, 1) if one else ("", FLOWS)
    forge(live, kind, port, OF_CLIENT if one else FLOWS, clients, first)
    live.put(None, **{setting: 20})
    assert served(live) == ALL
    assert served(live, "client2") == ALL
    if not one:
        within = 30 + FLOWS / TRIMMED  # so many a second
        live.until(lambda: live.values("status")["flows"] <= 20, "the rest has gone", within)
    live.put(None, **{setting: 50})
    assert served(live) == ALL


def test_a_flood_with_the_relays_address_keeps_nobody_out(shared: World) -> None:
    world = shared
    send_once(world)
    world.put(source="relay")
    forge(world, "udp", ECHO, 2 * FLOWS, 2 * FLOWS)
    assert served(world) == ALL
    counters = world.counted()
    assert counters.get("dropped_no_port", 0) == 0
    assert counters["evicted"] > FLOWS // 2


@pytest.mark.one_datapath("the kernel learns queries only with auto")
def test_a_table_full_of_unconfirmed_flows_leaves_queries_to_the_kernel(live: World) -> None:
    forge(live, "syn", RELAYED, 2 * FLOWS, 2 * FLOWS)
    assert live.values("status")["flows"] == FLOWS
    live.put(services=f"{SERVICES} udp/9")  # the rules are made once more
    assert not does_visit(live)
    assert served(live) == ALL
