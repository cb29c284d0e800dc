"""What RFC 4787, 5382 and 7857 require of a NAT, by packets from one wire to the other.

scapy builds each packet, a host sends it as it is, and what arrives at another host is taken from
its wire and judged by scapy.  The hosts' own kernels hear none of it.  In the tables a line is

    HOST PACKET => HOST PACKET      sent there, arrives here like this
    HOST PACKET => HOST nothing     a packet that is sent after it arrives, and this one doesn't

with clients C and D, the relay's addresses K (towards the server) and G, the servers S and Z.  A
port that the relay chooses is a word; the first line that names it binds it.
"""

import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.packet import Packet, Raw

from tests.net.routed import send, watching
from tests.net.world import GPORT, World

pytestmark = pytest.mark.net

SERVICES = "tcp/80 udp/7 udp/53 udp/123"
DEAF = """
table ip deaf {
  chain in {
    type filter hook input priority -400; policy drop;
    iifname "lo" accept
  }
}
"""
HOSTS = ("client", "client2", "server", "server2")


@pytest.fixture(scope="module")
def wires(datapath: str) -> Iterator[World]:
    """Relaying between hosts whose kernels answer nothing."""
    with World(datapath=datapath) as world:
        for host in HOSTS:
            # Neighbours are asked for by ARP, which is no IP.
            world.nft(host, DEAF)
        world.finish_packets("relay", "eth0", "eth1")
        world.begin(services=SERVICES)
        yield world


@pytest.fixture
def clean(wires: World) -> World:
    """No flows, and settings as they come."""
    for flow in wires.flows():
        wires.ask(f"kill {flow['id']}")
    wires.put(source="client", timeouts__udp=300, real_ip=wires.server)
    return wires


class Talk:
    """Packets between the hosts of a world, by the letters of a table."""

    def __init__(self, world: World) -> None:
        self.world = world
        address = world.lab.address
        self.names = {
            "C": world.client,
            "D": address("client2"),
            "K": world.relay,
            "G": address("relay", towards="client"),
            "S": world.server,
            "Z": address("server2"),
        }
        self.ports: dict[str, int] = {}
        self._number = 0

    def layers(self, text: str, payload: bytes, **fields: Any) -> Packet:
        """The packet `C:4000 > K:7`, or `S:80 > C:y [S.]`."""
        words = re.sub(r"\b([A-Z]):", lambda m: self.names[m[1]] + ":", text.split("[")[0])
        (src, sport), (dst, dport) = (end.strip().split(":") for end in words.split(">"))
        ports = {"sport": self.port(sport), "dport": self.port(dport)}
        head = IP(src=src, dst=dst, id=fields.pop("id", 7), tos=fields.pop("tos", 0))
        if "[" in text:
            flags = text.split("[")[1].rstrip("] ").replace(".", "A")
            return head / TCP(**ports, flags=flags, window=60000, **fields) / Raw(payload)
        return head / UDP(**ports) / Raw(payload)

    def port(self, word: str) -> int:
        """A number, or what a word stands for."""
        return int(word) if word.isdigit() else self.ports[word]

    def play(self, script: str) -> None:
        """Each line as it says."""
        for line in filter(None, map(str.strip, script.splitlines())):
            before, after = (part.split(None, 1) for part in line.split("=>"))
            self._number += 1
            payload = b"packet %d" % self._number
            sent = self.layers(before[1], payload)
            self.line(line, before[0], sent, after[0], after[1].strip())

    def line(self, line: str, host: str, sent: Packet, there: str, expected: str) -> None:
        """One packet, and what becomes of it."""
        payload, marker = bytes(sent[Raw]), b"marker %d" % self._number
        wanted = {payload, marker}
        with watching(self.world, there, lambda packet: load(packet) in wanted) as watch:
            send(self.world, host, bytes(sent))
            if expected == "nothing":
                to = self.world.lab.address(there)
                way = IP(src=self.world.lab.address("relay", towards=there), dst=to)
                send(self.world, "relay", bytes(way / UDP(sport=9, dport=9) / Raw(marker)))
                assert load(watch.next()) == marker, line
                return
            got = IP(watch.next())
        assert right(got), line
        assert bytes(got[Raw]) == payload, line
        self.agree(got, expected, line)

    def agree(self, got: Packet, expected: str, line: str) -> None:
        """The packet has these addresses and ports; binds the names of ports."""
        kind = TCP if TCP in got else UDP
        for end, addr, port in zip(
            expected.split("[")[0].split(">"),
            (got.src, got.dst),
            (got[kind].sport, got[kind].dport),
            strict=True,
        ):
            name, word = end.strip().split(":")
            assert addr == self.names[name], (line, got.summary())
            if not word.isdigit():
                assert self.ports.setdefault(word, port) == port, (line, got.summary())
            else:
                assert port == int(word), (line, got.summary())


def load(packet: bytes) -> bytes:
    """What a datagram or segment carries."""
    layers = IP(packet)
    return bytes(layers[Raw]) if Raw in layers else b""


def right(packet: Packet) -> bool:
    """Whether all its checksums are what scapy makes them."""
    again = packet.copy()
    kind = TCP if TCP in again else UDP
    for layer in (IP, kind):
        del again[layer].chksum
    return bytes(again) == bytes(packet)


@pytest.fixture
def talk(clean: World) -> Talk:
    return Talk(clean)


UDP_RULES = {
    "4787 REQ-1 the mapping is the same whatever it leads to": (
        "client",
        """
        client  C:4000 > K:7    => server  C:4000 > S:7
        client  C:4000 > K:53   => server  C:4000 > S:53
        client  C:4000 > K:7    => server  C:4000 > S:7
        """,
    ),
    "4787 REQ-3 two endpoints never share a port": (
        "client",
        """
        client  C:4000 > K:7    => server  C:4000 > S:7
        client  C:4000 > G:7    => server  C:other > S:7
        server  S:7 > C:4000    => client  K:7 > C:4000
        server  S:7 > C:other   => client  G:7 > C:4000
        client2 D:4000 > K:7    => server  D:4000 > S:7
        """,
    ),
    "4787 REQ-3 nor one of the relay": (
        "relay",
        """
        client  C:4000 > K:7    => server  K:4000 > S:7
        client2 D:4000 > K:7    => server  K:even > S:7
        client  C:4000 > K:53   => server  K:third > S:53
        server  S:7 > K:even    => client2 K:7 > D:4000
        server  S:7 > K:4000    => client  K:7 > C:4000
        server  S:53 > K:third  => client  K:53 > C:4000
        server  S:53 > K:4000   => client  nothing
        """,
    ),
    "4787 REQ-3a, REQ-4 the range and parity of the port are kept": (
        "relay",
        """
        client  C:1001 > K:7    => server  K:1001 > S:7
        client2 D:1001 > K:7    => server  K:lowodd > S:7
        client  C:5001 > K:7    => server  K:5001 > S:7
        client2 D:5001 > K:7    => server  K:highodd > S:7
        client  C:5002 > K:7    => server  K:5002 > S:7
        client2 D:5002 > K:7    => server  K:higheven > S:7
        """,
    ),
    "4787 REQ-8 only the server's service port may answer": (
        "client",
        """
        client  C:4000 > K:7    => server  C:4000 > S:7
        server  S:7 > C:4000    => client  K:7 > C:4000
        server  S:9 > C:4000    => client  S:9 > C:4000
        server2 Z:7 > C:4000    => client  Z:7 > C:4000
        server  S:7 > C:4001    => client  S:7 > C:4001
        """,
    ),
    "4787 REQ-8 the same where the relay is seen": (
        "relay",
        """
        client  C:4000 > K:7    => server  K:4000 > S:7
        server  S:9 > K:4000    => client  nothing
        server2 Z:7 > K:4000    => client  nothing
        server  S:7 > K:4001    => client  nothing
        server  S:7 > K:4000    => client  K:7 > C:4000
        """,
    ),
    "5382 REQ-3 a SYN from outside finds no mapping": (
        "client",
        """
        server  S:80 > C:4000 [S]   => client  S:80 > C:4000
        server2 Z:80 > C:4000 [S]   => client  Z:80 > C:4000
        """,
    ),
    "relaying: a late answer of NTP is no question": (
        "relay",
        """
        client  C:123 > K:123   => server  K:lowodd > S:123
        server  S:123 > K:lowodd => client K:123 > C:123
        """,
    ),
}
KINDS: dict[str, Callable[[int], bool]] = {
    "even": lambda port: port >= 1024 and port % 2 == 0,
    "lowodd": lambda port: port < 1024 and port % 2 == 1 and port != 123,
    "highodd": lambda port: port >= 1024 and port % 2 == 1,
    "higheven": lambda port: port >= 1024 and port % 2 == 0,
    "third": lambda port: port != 4000,
    "other": lambda port: port != 4000,
}


@pytest.mark.parametrize("rule", UDP_RULES)
def test_packets_arrive_as_the_rule_says(talk: Talk, rule: str) -> None:
    source, script = UDP_RULES[rule]
    talk.world.put(source=source)
    talk.play(script)

    assert all(KINDS[name](port) for name, port in talk.ports.items()), talk.ports
    assert len(set(talk.ports.values())) == len(talk.ports)


def flow_of(talk: Talk, client: str) -> dict[str, Any]:
    """The flow of a client's port."""
    [flow] = talk.world.soon(lambda: talk.world.flows(f"client={client}"), f"a row of {client}")
    return flow


def test_4787_req_5_mappings_live_as_long_as_set(talk: Talk) -> None:
    talk.play("""
        client  C:4000 > K:7    => server  C:4000 > S:7
        client  C:4001 > K:53   => server  C:4001 > S:53
    """)

    assert 299 < flow_of(talk, f"{talk.world.client}:4000")["expires"] <= 300
    assert 19 < flow_of(talk, f"{talk.world.client}:4001")["expires"] <= 20
    talk.world.put(timeouts__udp=1)
    talk.world.until(lambda: not talk.world.flows(f"client={talk.world.client}:4000"), "its end", 4)
    talk.play("server  S:7 > C:4000  => client  S:7 > C:4000")


@pytest.mark.parametrize(
    "refresh",
    [
        "client  C:4000 > K:7    => server  C:4000 > S:7",
        "server  S:7 > C:4000    => client  K:7 > C:4000",
    ],
    ids=["outbound", "inbound"],
)
def test_4787_req_6_packets_of_both_directions_refresh(talk: Talk, refresh: str) -> None:
    talk.play("client  C:4000 > K:7    => server  C:4000 > S:7")
    client = f"{talk.world.client}:4000"
    talk.world.until(lambda: flow_of(talk, client)["idle"] >= 0.5, "some idleness")
    talk.play(refresh)

    def refreshed() -> bool:
        flow = flow_of(talk, client)
        return bool(flow["idle"] < 0.5 and flow["expires"] > 299.5)

    talk.world.soon(refreshed, "the row refreshed")


def test_4787_req_10_5382_req_6_what_a_packet_says_is_never_changed(talk: Talk) -> None:
    """Nor its identification, type of service and the flag that forbids fragments (RFC 6864)."""
    text = f"PORT {talk.world.client.replace('.', ',')},15,160".encode()
    for flags, ident, tos in ((0, 0x1234, 0xB8), (2, 0, 0)):
        packet = talk.layers("C:4000 > K:7", text, id=ident, tos=tos)
        packet[IP].flags = flags
        with watching(talk.world, "server", lambda got: load(got) == text) as watch:
            send(talk.world, "client", bytes(packet))
            got = IP(watch.next())
        assert right(got)
        assert (got.tos, int(got.flags), got.ttl) == (tos, flags, 63)
        assert got.id == ident or not ident  # a raw socket's kernel fills in a zero (raw(7))


def test_4787_req_11_the_same_under_load(talk: Talk) -> None:
    packets = [bytes(talk.layers(f"D:{port} > K:7", b"load")) for port in range(20000, 20400)]
    send(talk.world, "client2", *packets)
    talk.world.until(lambda: len(talk.world.flows()) >= 390, "rows")
    talk.play("""
        client  C:20000 > K:7   => server  C:20000 > S:7
        client  C:20000 > G:7   => server  C:other > S:7
        server  S:7 > C:20000   => client  K:7 > C:20000
    """)
    assert talk.ports["other"] % 2 == 0


# TCP: both ends are crafted, tcp-relay is between them


class Connection:
    """A connection from C:port: each end's segments, with the numbers that they need."""

    def __init__(self, talk: Talk, port: int) -> None:
        self.talk, self.port = talk, port
        self.held = ExitStack()
        self.seq = {"client": 1000, "server": 5000}
        self.ack = {"client": 0, "server": 0}
        world = talk.world
        self.wires = {
            host: self.held.enter_context(watching(world, host, self.admits(host)))
            for host in ("client", "server")
        }
        self.y = 0

    def admits(self, host: str) -> Callable[[bytes], bool]:
        """What belongs to it on that wire."""

        def admits(packet: bytes) -> bool:
            layers = IP(packet)
            if TCP not in layers:
                return False
            ends = (layers[TCP].sport, layers[TCP].dport)
            return ends == (80, self.port) if host == "client" else ends[1] == 80

        return admits

    def says(self, host: str, flags: str, payload: bytes = b"", **fields: int) -> None:
        """A segment of that end."""
        way = f"C:{self.port} > K:80" if host == "client" else f"S:80 > C:{self.y}"
        numbers = {"seq": self.seq[host], "ack": self.ack[host]} | fields
        segment = self.talk.layers(f"{way} [{flags}]", payload, **numbers)
        if not payload:
            segment[TCP].remove_payload()
        send(self.talk.world, host, bytes(segment))
        if not fields:
            self.seq[host] += len(payload) + ("S" in flags) + ("F" in flags)

    def hears(self, host: str, flags: str) -> Packet:
        """The next segment with these flags that arrives at that end."""
        while True:
            got = IP(self.wires[host].next())
            assert right(got), got.summary()
            segment = got[TCP]
            ours = self.talk.names["K" if host == "client" else "C"]
            assert got.src == ours
            if host == "server" and self.y and segment.sport != self.y:
                continue
            if str(segment.flags) == flags.replace(".", "A"):
                size = len(bytes(segment[Raw])) if Raw in segment else 0
                self.ack[host] = segment.seq + size + ("S" in flags) + ("F" in flags)
                if host == "server":
                    self.y = segment.sport
                return got

    def open(self) -> "Connection":
        """Both handshakes."""
        self.says("client", "S")
        self.hears("client", "SA")
        self.says("client", ".")
        self.hears("server", "S")
        self.says("server", "S.")
        self.hears("server", "A")
        return self

    @property
    def flow(self) -> dict[str, Any]:
        return flow_of(self.talk, f"{self.talk.world.client}:{self.port}")

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()


def test_5382_req_2_each_step_of_a_connection_passes_in_both_directions(talk: Talk) -> None:
    with Connection(talk, 40001).open() as it:
        it.says("client", "P.", b"question")
        assert bytes(it.hears("server", "PA")[Raw]) == b"question"
        it.says("server", "P.", b"answer")
        assert bytes(it.hears("client", "PA")[Raw]) == b"answer"
        it.says("client", "F.")
        it.hears("server", "FA")  # half-closed: the other direction goes on
        it.says("server", "P.", b"and more")
        assert bytes(it.hears("client", "PA")[Raw]) == b"and more"
        assert it.flow["state"] == "established"
        it.says("server", "F.")
        it.hears("client", "FA")
        it.says("client", ".")
        talk.world.until(lambda: it.flow["state"] == "closed", "its end")


def test_5382_req_2a_a_simultaneous_open_towards_the_server(talk: Talk) -> None:
    """Its SYN crosses ours (RFC 9293, figure 8)."""
    with Connection(talk, 40002) as it:
        it.says("client", "S")
        it.hears("client", "SA")
        it.says("client", ".")
        it.hears("server", "S")
        it.says("server", "S", ack=0, seq=5000)
        it.seq["server"] += 1
        it.hears("server", "SA")
        it.says("server", ".")
        it.says("server", "P.", b"hello")
        assert bytes(it.hears("client", "PA")[Raw]) == b"hello"
        assert it.flow["state"] == "established"


def test_5382_req_3_only_the_server_of_a_connection_is_heard(talk: Talk) -> None:
    with Connection(talk, 40003).open() as it:
        talk.ports["y"] = it.y
        before = talk.world.complete(lambda: it.flow["packets"])
        talk.play("""
            server2 Z:80 > C:y [.]  => client  Z:80 > C:y
            server  S:81 > C:y [.]  => client  S:81 > C:y
        """)
        assert talk.world.complete(lambda: it.flow["packets"]) == before


def test_5382_req_5_7857_2_1_the_timers_are_those_of_the_states(talk: Talk) -> None:
    with Connection(talk, 40004) as it:
        it.says("client", "S")
        it.hears("client", "SA")
        assert (it.flow["state"], 239 < it.flow["expires"] <= 240) == ("opening", True)
        it.says("client", ".")
        it.hears("server", "S")
        assert it.flow["state"] == "opening"
        it.says("server", "S.")
        it.hears("server", "A")
        assert (it.flow["state"], 7439 < it.flow["expires"] <= 7440) == ("established", True)


def test_5382_req_7_connections_never_share_a_port_towards_the_server(talk: Talk) -> None:
    with Connection(talk, 40005).open() as one, Connection(talk, 40006).open() as other:
        assert one.y != other.y
        assert {one.flow["relay"], other.flow["relay"]} == {
            f"{talk.world.relay}:{one.y}",
            f"{talk.world.relay}:{other.y}",
        }


def test_7857_2_2_a_forged_reset_is_passed_on_and_leaves_the_flow_its_time(talk: Talk) -> None:
    """The relay's host judges it by its number: what it is about goes on, and the flow with it."""
    with Connection(talk, 40007).open() as it:
        talk.world.until(lambda: it.flow["idle"] >= 0.3, "some idleness")
        it.says("server", "R", seq=it.seq["server"] + 10**9, ack=0)
        time.sleep(0.3)
        assert it.flow["state"] == "established"
        assert it.flow["idle"] >= 0.3, "a RST refreshes nothing"
        it.says("server", "P.", b"still here")
        assert bytes(it.hears("client", "PA")[Raw]) == b"still here"
        talk.world.soon(
            lambda: (it.flow["state"], it.flow["expires"] > 7400) == ("established", True),
            "nothing but the time that went by",
        )


def test_a_reset_that_is_one_ends_both_legs_and_the_flow_soon(talk: Talk) -> None:
    with Connection(talk, 40008).open() as it:
        it.says("server", "R.")
        it.hears("client", "RA")
        talk.world.until(lambda: it.flow["state"] == "closed", "its end")
        assert it.flow["expires"] <= 10


def test_who_talks_to_the_gateway_port_is_reset(talk: Talk) -> None:
    with watching(talk.world, "client", lambda p: TCP in IP(p)) as watch:
        packet = talk.layers(f"C:40009 > K:{GPORT} [S]", b"")
        send(talk.world, "client", bytes(packet))
        got = IP(watch.next())
    assert right(got)
    assert (got[TCP].sport, str(got[TCP].flags)) == (GPORT, "RA")
