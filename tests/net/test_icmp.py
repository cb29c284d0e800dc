"""ICMP errors through the relay: crafted ones looked at on the wire, and what users' tools show."""

import re
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import pytest
from scapy.utils import checksum

from krelay_vm import relay_topology
from tests.net.routed import MTU, hearing, is_error, routed, send, watching
from tests.net.test_cases import ping
from tests.net.test_firewall import FIREWALL
from tests.net.world import GPORT, World, echo, greet, upload
from tests.tools.errors import error
from tests.tools.packets import template

pytestmark = pytest.mark.net

SERVICES = "tcp/80 tcp/443 udp/7 udp/53 udp/33434-33500 udp/44444-44500"
UDP_PORT = 40007
IP_RECVERR = 11
"""linux/in.h: also errors that may pass, "no route to host" for one, are told to the program."""
IP_MTU = 14
"""linux/in.h: what is known of the path's MTU."""
IP_MTU_DISCOVER, IP_PMTUDISC_DONT, IP_PMTUDISC_DO, IP_PMTUDISC_PROBE = 10, 0, 2, 3
TIMES = re.compile(r" +\d+\.\d+ ?ms|in \d+\.\d+ seconds|;; Query time.*")


class Ends(NamedTuple):
    """A world with one UDP and one TCP conversation under way, and the letters of a case."""

    world: World
    tcp: socket.socket
    names: dict[str, str]

    def spelt(self, text: str) -> str:
        """The text with addresses for letters and ports for their names."""
        text = re.sub(r"\b([CKSNF])\b(?=[: ])", lambda m: self.names[m[1]], text)
        return re.sub(r":([xy])\b", lambda m: ":" + self.names[m[1]], text)


def under_way(source: str, datapath: str) -> Iterator[Ends]:
    with routed(datapath) as world:
        world.serve("server", "tcp/80", "tcp/443", "udp/7")
        world.begin(services=SERVICES, source=source)
        assert world.who_udp("client", 7, bind=UDP_PORT)
        tcp = world.connect("client", 80)
        greet(tcp)
        [flow] = world.flows("proto=tcp")
        address = world.lab.address
        names = {
            "C": world.client,
            "K": world.relay,
            "S": world.server,
            "N": address("near", towards="relay"),
            "F": address("far"),
            "x": flow["client"].partition(":")[2],
            "y": flow["relay"].partition(":")[2],
        }
        yield Ends(world, tcp, names)


@pytest.fixture(scope="module", params=["client", "relay"])
def ends(request: pytest.FixtureRequest, datapath: str) -> Iterator[Ends]:
    """Both conversations, with that source."""
    yield from under_way(request.param, datapath)


# who sends what, and what arrives where; with either source
BOTH = {
    "the client's port unreachable": (
        "client: C > K 3/3 about K:7 > C:40007",
        "server: {C} > S 3/3 about S:7 > {C}:40007",
    ),
    "too big for a link before the relay": (
        "near: N > K 3/4 about K:7 > C:40007",
        "server: {N} > S 3/4 about S:7 > {C}:40007",
    ),
    "too big for a link before the relay, TCP": (
        "near: N > K 3/4 about K:80 > C:x [.]",
        f"relay: N > K 3/4 about K:{GPORT} > C:x [.]",
    ),
    "too big for a link behind the relay": (
        "far: F > {C} 3/4 about {C}:40007 > S:7",
        "client: {F} > C 3/4 about C:40007 > K:7",
    ),
    "too big for a link behind the relay, TCP": (
        "far: F > {C} 3/4 about {C}:y > S:80 [.]",
        "relay: F > K 3/4 about K:y > S:80 [.]",
    ),
    "time exceeded": (
        "far: F > {C} 11/0 about {C}:40007 > S:7",
        "client: {F} > C 11/0 about C:40007 > K:7",
    ),
    "time exceeded, TCP": (
        "far: F > {C} 11/0 about {C}:y > S:80 [S]",
        "relay: F > K 11/0 about K:y > S:80 [S]",
    ),
    "the server's port unreachable": (
        "server: S > {C} 3/3 about {C}:40007 > S:7",
        "client: K > C 3/3 about C:40007 > K:7",
    ),
    "the server prohibits": (
        "server: S > {C} 3/13 about {C}:y > S:80 [S]",
        "relay: S > K 3/13 about K:y > S:80 [S]",
    ),
    "parameter problem": (
        "server: S > {C} 12/0 about {C}:40007 > S:7",
        "client: K > C 12/0 about C:40007 > K:7",
    ),
    "of a flow that nobody knows": (
        "far: F > C 3/4 about C:40008 > S:7",
        "client: F > C 3/4 about C:40008 > S:7",
    ),
    "of a service that isn't relayed": (
        "server: S > C 3/3 about C:40007 > S:9",
        "client: S > C 3/3 about C:40007 > S:9",
    ),
    "source quench is obsolete": (
        "server: S > C 4/0 about C:40007 > S:9",
        "client: S > C 4/0 about C:40007 > S:9",
    ),
}


@pytest.mark.parametrize("name", BOTH)
def test_an_error_arrives_in_the_words_of_whom_it_is_for(ends: Ends, name: str) -> None:
    """`{C}`: with source=relay the server knows the relay alone, and hears of nobody else."""
    world = ends.world
    hidden = world.values("config")["source"] == "relay"
    shown = {"C": "K", "N": "K", "F": "K"} if hidden else {"C": "C", "N": "N", "F": "F"}
    before, after = (ends.spelt(text.format(**shown)) for text in BOTH[name])
    sender, _, sent = before.partition(": ")
    host, _, expected = after.partition(": ")
    packet = template("C:1 > S:1" + (" [S]" if "[S]" in sent else " [.]" if "[" in sent else ""))
    packet = replace(packet, payload=bytes(range(64)))

    look = hearing if host == "relay" else watching
    with look(world, host, is_error) as watch:
        send(world, sender, error(sent, packet=packet))
        arrived = watch.next()

    wanted = error(expected, packet=packet)
    assert arrived[20:] == wanted[20:]
    assert arrived[12:20] == wanted[12:20]
    assert checksum(arrived[:20]) == 0
    echo(ends.tcp, b"undisturbed")  # RFC 5382, REQ-10
    assert world.who_udp("client", 7, bind=UDP_PORT)  # RFC 4787, REQ-12


def test_errors_are_counted_by_step_and_the_rest_by_reason(ends: Ends) -> None:
    world = ends.world
    before = world.values("counters")
    shown = "K" if world.values("config")["source"] == "relay" else "C"
    for text, host in (
        (f"F > {shown} 3/4 about {shown}:y > S:80 [.]", "relay"),
        ("N > K 3/4 about K:80 > C:x [.]", "relay"),
        (f"F > {shown} 11/0 about {shown}:40007 > S:7", "client"),
        ("F > C 3/3 about C:40008 > S:7", "client"),
    ):
        look = hearing if host == "relay" else watching
        with look(world, host, is_error) as watch:
            send(world, "near" if text.startswith("N") else "far", error(ends.spelt(text)))
            watch.next()
    after = world.values("counters")

    more = {name: after[name] - before.get(name, 0) for name in after if "icmp" in name}
    unknown = 2 + (shown == "C")  # once at each hook, and the known one of two hooks at the first
    assert {name: n for name, n in more.items() if n} == {
        "icmp_T1": 1,
        "icmp_T4": 1,
        "icmp_U3": 1,
        "icmp_U4": 1,
        "passed_icmp_no_flow": unknown,
        "passed_icmp_no_row": unknown,  # as it was called before
    }


@pytest.mark.parametrize("where", ["its own", "the quoted header's"])
def test_an_error_with_a_bad_checksum_is_dropped_and_counted(ends: Ends, where: str) -> None:
    world = ends.world
    hidden = world.values("config")["source"] == "relay"
    text = ends.spelt("F > C 11/0 about C:40007 > S:7".replace("C", "K" if hidden else "C"))
    good = error(text, packet=template("C:1 > S:1", payload=b"good"))
    if where == "its own":
        counter, bad = "dropped_icmp_checksum", good[:-4] + b"evil"
    else:
        counter = "dropped_icmp_quoted_checksum"
        bad = error(text, packet=template("C:1 > S:1", payload=b"evil", ip_check_error=1))
    before = world.values("counters").get(counter, 0)

    with watching(world, "client", is_error) as watch:
        send(world, "far", bad, good)
        assert watch.next().endswith(b"good")
    assert world.values("counters")[counter] == before + 1


def test_ping_never_visits_the_queue(ends: Ends) -> None:
    world = ends.world

    def counted() -> dict[str, object]:
        """All but what tcp-relay tells once a second, of connections before."""
        counters = world.values("counters")
        return {name: counters[name] for name in counters if not name.startswith("tcp_")}

    before = world.complete(counted)
    for to in (world.relay, world.server):
        assert ping(world, to)

    assert counted() == before


# Tools


def both_ways(world: World, *command: str) -> tuple[str, str]:
    """What a tool shows of the server, asked directly and through the relay: TARGET in `command`.

    It stands in what is shown as well; times are left out.
    """
    shown = []
    for to in (world.server, world.relay):
        argv = [word.replace("TARGET", to) for word in command]
        done = world.lab.run("client", *argv, timeout=60, check=False)
        text = (done.stdout + done.stderr).replace(to, "TARGET")
        shown.append(TIMES.sub("", text))
    return shown[0], shown[1]


@pytest.fixture(scope="module")
def relayed(datapath: str) -> Iterator[World]:
    """A world with source=client, and a server whose other ports are closed."""
    with routed(datapath) as world:
        world.serve("server", "tcp/80", "tcp/443", "udp/7")
        world.begin(services=SERVICES)
        yield world


@pytest.mark.parametrize(
    "options", [("-U", "-p", "7"), ("-U", "-p", "53"), ()], ids=["answered", "closed", "rising"]
)
def test_traceroute_shows_every_router_as_it_does_directly(
    relayed: World, options: tuple[str, ...]
) -> None:
    """`-U` asks one port; without it each probe has a port of its own, from 33434 on."""
    command = ("traceroute", "-n", "-q", "1", "-N", "1", "-w", "5", *options, "TARGET")
    direct, through = both_ways(relayed, *command)

    assert through == direct
    hops = [line.split()[1] for line in through.splitlines()[1:]]
    far, last = relayed.lab.address("far"), relayed.lab.address("last")
    assert hops == ["10.77.1.1", "10.77.2.2", far, last, "TARGET"]


def test_tracepath_finds_the_narrow_link(relayed: World) -> None:
    """It shows a hop twice, or none, where an answer takes a second: then it is asked again."""
    tracepath = ("tracepath", "-n", "-p", "44444", "TARGET")
    for _ in range(10):
        direct, through = both_ways(relayed, *tracepath)
        if through == direct:
            break

    assert through == direct
    assert f"pmtu {MTU} hops 5 back 5" in through


def test_dig_is_told_at_once_that_the_port_is_closed(relayed: World) -> None:
    dig = ("dig", "+tries=1", "+time=8", "+nocmd", "@TARGET", "www.example")
    direct, through = both_ways(relayed, *dig)

    assert through == direct
    assert "connection refused" in through


def test_nmap_finds_the_same_ports_as_at_the_server(relayed: World) -> None:
    """TCP 81 and UDP 9 are no services: there the relay's own closed ports answer."""
    ports = "T:80,81,443,U:7,9,53"
    nmap = ("nmap", "-n", "-Pn", "-sS", "-sU", "--max-retries", "3", "-p", ports, "TARGET")
    direct, through = both_ways(relayed, *nmap)

    def ports_of(text: str) -> list[str]:
        return re.findall(r"^\d+/\w+ +\S+", text, re.M)

    assert ports_of(through) == ports_of(direct)
    assert [" ".join(line.split()) for line in ports_of(through)] == [
        "80/tcp open", "81/tcp closed", "443/tcp open",
        "7/udp open", "9/udp closed", "53/udp closed",
    ]  # fmt: skip


def segments_to(port: int) -> Callable[[bytes], bool]:
    """TCP segments with data to this port."""
    return lambda packet: packet[9] == 6 and packet[22:24] == port.to_bytes(2) and len(packet) > 100


def test_tcp_finds_the_narrow_link_behind_the_relay_and_keeps_df(relayed: World) -> None:
    """Nothing but the router's error tells tcp-relay's kernel: both ends' own links take 1,500."""
    for host in ("relay", "server"):
        relayed.lab.run(host, "ip", "route", "flush", "cache")
    relayed.finish_packets("relay", "eth1")
    before = relayed.values("counters")["icmp_T4"]
    with (
        watching(relayed, "server", segments_to(80)) as watch,
        relayed.connect("client", 80) as sock,
    ):
        upload(sock, seed=3, size=3_000_000)
        segments = [watch.next() for _ in range(50)]  # what the capture holds

    assert all(segment[6] & 0x40 for segment in segments)
    assert max(map(len, segments)) == MTU
    assert relayed.values("counters")["icmp_T4"] > before
    route = relayed.lab.run("relay", "ip", "route", "get", relayed.server).stdout
    assert f"mtu {MTU}" in route


def test_curl_downloads_and_uploads_over_the_narrow_link(relayed: World) -> None:
    relayed.nginx("server", 8080)
    relayed.put(services="tcp/8080 " + SERVICES)
    body = relayed.lab.directory / "body"
    body.write_bytes(bytes(range(256)) * 4000)
    files = relayed.lab.directory / "nginx-server/www/files"
    files.mkdir(parents=True, exist_ok=True)
    (files / "blob").write_bytes(body.read_bytes())
    got = relayed.lab.directory / "got"
    url = f"http://{relayed.relay}:8080"
    curl = ("curl", "-sS", "--max-time", "20")

    for host in ("relay", "server"):  # what it knows of the path it would tell as its MSS
        relayed.lab.run(host, "ip", "route", "flush", "cache")
    relayed.lab.run("client", *curl, "-T", str(body), f"{url}/files/from-client", timeout=30)
    assert (files / "from-client").read_bytes() == body.read_bytes()
    relayed.lab.run("client", *curl, "-o", str(got), f"{url}/files/blob", timeout=30)
    assert got.read_bytes() == body.read_bytes()


@pytest.mark.parametrize("size", [1272, 1273, 1472])
def test_a_datagram_that_must_not_be_fragmented_is_told_the_paths_mtu(
    relayed: World, size: int
) -> None:
    """RFC 4787, REQ-13; 1,272 bytes fill the narrow link."""
    with relayed.open("client", socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
        sock.connect((relayed.relay, 7))
        sock.send(bytes(size))
        if size <= MTU - 28:
            assert sock.recv(2000) == bytes(size)
            return
        with pytest.raises(OSError, match="Message too long"):
            sock.recv(2000)
        sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DO)
        assert sock.getsockopt(socket.IPPROTO_IP, IP_MTU) == MTU
        relayed.lab.run("client", "ip", "route", "flush", "cache")


TRACKING = "table ip tracking { chain in { type filter hook input priority 0; ct state new; }; }"


@pytest.mark.parametrize("tracking", [False, True], ids=["", "conntrack"])
@pytest.mark.parametrize("source", ["client", "relay"])
def test_the_relays_own_narrow_link_is_told_of_as_well(
    source: str, tracking: bool, datapath: str
) -> None:
    """About the first packet by krelay, about later ones by its host's kernel."""
    with World(relay_topology("172.20.5.0/24", "10.77.3.0/24"), datapath=datapath) as world:
        world.serve("server", "udp/7")
        for host, wire in (("relay", "eth1"), ("server", "eth0")):
            world.lab.run(host, "ip", "link", "set", wire, "mtu", "1200")
        world.begin(source=source)
        if tracking:
            world.nft("relay", TRACKING)
        data = bytes(range(250)) * 20
        for first in (b"", b"small"):
            with world.open("client", socket.SOCK_DGRAM) as sock:
                sock.connect((world.relay, 7))
                if first:
                    sock.send(first)
                    assert sock.recv(100) == first
                sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_PROBE)
                sock.send(bytes(1400))
                with pytest.raises(OSError, match="Message too long"):
                    sock.recv(2000)
                assert sock.getsockopt(socket.IPPROTO_IP, IP_MTU) == 1200
                sock.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, IP_PMTUDISC_DONT)
                sock.send(data)
                assert sock.recv(1 << 16) == data
            world.lab.run("client", "ip", "route", "flush", "cache")


@pytest.mark.parametrize("source", ["client", "relay"])
def test_a_server_that_is_gone_from_the_link_is_told_to_both_kinds_of_client(
    source: str, datapath: str
) -> None:
    """The relay host's own error, about packets as they left: to whom they belonged before."""
    with World(datapath=datapath) as world:
        world.begin(source=source)
        for setting in ("retrans_time_ms=50", "mcast_solicit=2"):
            world.lab.run("relay", "sysctl", "-qw", f"net.ipv4.neigh.eth1.{setting}")
        world.lab.link_down("server")
        with world.open("client", socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
            sock.connect((world.relay, 7))
            sock.send(b"anybody?")
            with pytest.raises(OSError, match="No route to host"):
                sock.recv(1)
        with pytest.raises(ConnectionResetError), world.connect("client", 80) as tcp:
            tcp.recv(1)
        world.until(lambda: "no route to host" in world.tcp_relay_process.output, "the reason")


@pytest.mark.parametrize("host", ["server", "neighbour"])
def test_who_is_beside_the_server_is_told_too(world: World, host: str) -> None:
    """RFC 5508, REQ-7: hairpinned, and with source=relay."""
    world.begin()
    with world.open(host, socket.SOCK_DGRAM) as sock:
        sock.connect((world.relay, 7))
        sock.send(b"anybody?")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(1)


RELATED = "ct state established,related accept"
STRICT = FIREWALL.replace(RELATED, f"ct state invalid drop\n{RELATED}").replace(
    "udp dport 53", "udp dport 1-10 reject\nudp dport 11-60000"
)


def test_with_connection_tracking_and_a_firewall_errors_arrive_as_well(datapath: str) -> None:
    """Connection tracking sees an error as it sees the packet that it quotes, and it is related.

    What the firewall rejects by itself is rejected as without krelay.
    """
    with routed(datapath) as world:
        world.serve("server", "tcp/80")
        world.begin(services=SERVICES.replace("udp/7 ", ""))
        world.nft("relay", STRICT)
        for port in (53, 7):
            with world.open("client", socket.SOCK_DGRAM) as sock:
                sock.connect((world.relay if port == 53 else world.server, port))
                sock.send(b"?")
                with pytest.raises(ConnectionRefusedError):
                    sock.recv(1)
        upload(world.connect("client", 80), seed=3, size=1_000_000)
        direct, through = both_ways(world, "traceroute", "-n", "-q", "1", "-N", "1", "TARGET")
        assert through == direct
        assert "*" not in through
