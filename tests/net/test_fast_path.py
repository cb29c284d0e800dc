"""Flows that the kernel was given: ended, flushed, switched, left alone, and always told of."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from typing import Any

import pytest

from krelay.host.attachment import Attachment
from krelay.offload.service import MOST_LOSSES
from krelay.rules.spec import instance_name
from procfs_sim.tree import DEFAULT_ROOT
from tests.net.test_cases import flow_of
from tests.net.test_datapaths import udp_flow, visits
from tests.net.test_faults import nothing_unrewritten, revive
from tests.net.world import AGREES_WITHIN, GPORT, World, echo, greet
from tests.tools import bpfmaps

pytestmark = [
    pytest.mark.net,
    pytest.mark.one_datapath("what the kernel was given is there in one of them alone"),
]

DATAGRAM = b"some words"
UNDER_WAY = 60
"""Datagrams that wait for their answers at most: all that a socket surely holds."""
BUSY = 4
"""Packets after which a direction of UDP is offloaded."""
LOST = "what the kernel has of flows isn't as krelay left it; made anew"
FLUSHED = "krelay's rules were taken out; they are put back"
Element = tuple[str, str, str]
"""Protocol and step, source and destination: `udp-u12`, `10.0.0.1:4000`, ..."""


@pytest.fixture
def busy(world: World) -> World:
    """Relaying all that our server serves."""
    world.serve("server", "tcp/80", "tcp/443", "udp/7")
    world.begin(services="tcp/80 tcp/443=forward udp/7")
    return world


def table(world: World) -> str:
    return instance_name(str(world.root), DEFAULT_ROOT)


def elements(world: World) -> set[Element]:
    """What stands in the map of the kernel's programs."""
    with world.lab.enter("relay"):
        found = bpfmaps.entries(table(world))
    return {(f"{e.proto}-{e.step.name.lower()}", e.src, e.dst) for e in found}


def wanted(flow: dict[str, Any]) -> set[Element]:
    """The elements that the kernel may have for a flow of which no port was changed."""
    client, service, server = flow["client"], flow["service"], flow["server"]
    proto = flow["proto"]
    if flow.get("gport") is None:
        return {(f"{proto}-u12", client, service), (f"{proto}-u34", server, client)}
    host, gate = client.partition(":")[0], service.partition(":")[0]
    found = {
        ("tcp-t1", client, service),
        ("tcp-t2", f"{gate}:{flow['gport']}", client),
    }
    if "relay" in flow:
        port = flow["relay"].partition(":")[2]
        found |= {("tcp-t3", flow["relay"], server), ("tcp-t4", server, f"{host}:{port}")}
    return found


def needed(flow: dict[str, Any]) -> set[Element]:
    """Those of them that it must have."""
    if flow["proto"] == "tcp":
        return wanted(flow) if flow["state"] == "established" else set()
    u12, u34 = sorted(wanted(flow))
    return {each for each, n in zip((u12, u34), flow["packets"], strict=True) if n > BUSY}


def fast_udp(world: World, host: str = "client") -> socket.socket:
    """A client's datagrams that the kernel has."""
    sock = world.open(host, socket.SOCK_DGRAM)
    for _ in range(BUSY):
        world.exchange(sock, b"busy", (world.relay, 7))
    until_fast(world, lambda: world.exchange(sock, b"fast", (world.relay, 7)))
    return sock


def fast_tcp(world: World, port: int) -> socket.socket:
    """A connection that the kernel has."""
    sock = world.connect("client", port)
    greet(sock)
    until_fast(world, lambda: echo(sock, b"fast"))
    return sock


def until_fast(world: World, act: Callable[[], object], within: float | None = None) -> None:
    """Waits until what this does visits no queue."""

    def is_fast() -> bool:
        before = visits(world)
        act()
        return visits(world) == before

    world.until(is_fast, "the kernel's path", within)


def flow(world: World, sock: socket.socket) -> dict[str, Any]:
    found = udp_flow(world, sock) if sock.type == socket.SOCK_DGRAM else flow_of(world, sock)
    assert found is not None
    return found


# Beginnings


def test_a_connection_costs_one_visit_to_the_queue_and_its_flow_tells_all(busy: World) -> None:
    before = visits(busy)
    with busy.connect("client", 80) as sock:
        assert greet(sock).startswith(busy.client)
        echo(sock, b"once")
        sock.shutdown(socket.SHUT_WR)
        assert sock.recv(1) == b""
        client = f"{busy.client}:{sock.getsockname()[1]}"

    def ended() -> dict[str, Any] | None:
        return next(
            (flow for flow in busy.flows(f"client={client}") if flow["state"] == "closed"), None
        )

    flow = busy.until(ended, "its end")
    assert flow["packets"][0] >= 6  # SYN, ACK, two queries, FIN, ACK
    assert flow["packets"][1] >= 4
    assert visits(busy) - before == 1


# Ends


def is_over(world: World, number: int) -> bool:
    """Whether no flow of this number lives."""
    flows = [flow for flow in world.flows() if flow["id"] == number]
    return all(flow["state"] in ("closing", "closed") for flow in flows)


def test_what_came_in_fragments_leaves_in_fragments_and_is_relayed_all_the_same(
    busy: World,
) -> None:
    """The relay's kernel cuts a datagram into pieces as large as it came in, behind POSTROUTING,
    also where the link would take it whole."""
    with closing(fast_udp(busy)) as sock:
        client = busy.lab.address("client")
        gate = busy.run("server", "ip", "route", "get", client).split()[2]
        busy.run("server", "ip", "route", "add", client, "via", gate, "mtu", "600")
        for size in (500, 1000, 1400):
            assert busy.exchange(sock, bytes(size), (busy.relay, 7)) == bytes(size)


def test_a_flow_that_is_killed_ends_at_once(busy: World) -> None:
    udp, terminated, forwarded = fast_udp(busy), fast_tcp(busy, 80), fast_tcp(busy, 443)
    for sock in (terminated, forwarded):
        number = flow(busy, sock)["id"]
        busy.ask(f"kill {number}")
        with pytest.raises(ConnectionResetError):
            sock.recv(1)
        busy.until(partial(is_over, busy, number), "its end")
    number = flow(busy, udp)["id"]
    busy.ask(f"kill {number}")
    assert busy.exchange(udp, b"anew", (busy.relay, 7)) == b"anew"
    again = flow(busy, udp)
    assert again["id"] != number
    assert again["packets"] == [1, 1]
    busy.until(lambda: not elements(busy), "nothing in the kernel")


@pytest.mark.serial
def test_a_flow_that_falls_silent_expires_neither_early_nor_late(busy: World) -> None:
    timeout = 2
    busy.put(timeouts__udp=timeout)
    socks = [fast_udp(busy) for _ in range(20)]
    last = {}
    for sock in socks:
        busy.exchange(sock, b"last", (busy.relay, 7))
        last[sock.getsockname()[1]] = time.monotonic()
        time.sleep(0.05)
    gone: dict[int, tuple[float, float]] = {}
    before = time.monotonic()
    while len(gone) < len(socks):
        assert time.monotonic() < before + 5 * timeout
        asked = time.monotonic()
        ports = {int(each["client"].partition(":")[2]) for each in busy.flows("proto=udp")}
        for port in last.keys() - gone.keys() - ports:
            gone[port] = asked, time.monotonic()
        time.sleep(0.02)
    for port, (earliest, latest) in gone.items():
        assert latest - last[port] >= timeout, "early"
        # The table looks once a second; and a flow may have been heard of at the time of a look.
        assert earliest - last[port] <= timeout + 1 + AGREES_WITHIN, "late"
    assert not elements(busy)


@pytest.mark.serial
def test_the_kernel_has_what_krelay_has_within_the_time_that_is_promised(busy: World) -> None:
    udp, terminated, forwarded = fast_udp(busy), fast_tcp(busy, 80), fast_tcp(busy, 443)
    other = busy.open("client", socket.SOCK_DGRAM)
    for _ in range(BUSY):
        busy.exchange(other, b"busy", (busy.relay, 7))
    until_fast(busy, lambda: busy.exchange(other, b"fast", (busy.relay, 7)), AGREES_WITHIN)
    usual = elements(busy)
    for hand in (HANDS["a step"], HANDS["some steps"]):
        hand(busy, ("", "", ""))
        echo(terminated, b"goes on")
        echo(forwarded, b"goes on")
        for sock in (udp, other):
            busy.exchange(sock, b"goes on", (busy.relay, 7))
        busy.until(lambda: elements(busy) == usual, "all in the kernel again", AGREES_WITHIN)
    for sock in (udp, other, terminated, forwarded):
        busy.ask(f"kill {flow(busy, sock)['id']}")
    busy.until(lambda: not elements(busy), "nothing in the kernel", AGREES_WITHIN)


def test_relaying_that_stops_leaves_nothing_in_the_kernel(busy: World) -> None:
    before = busy.values("counters")
    socks = [fast_udp(busy), fast_tcp(busy, 80), fast_tcp(busy, 443)]
    assert len(elements(busy)) == 2 + 4 + 2
    busy.put(start=0)
    busy.until_state("stopped")

    assert busy.run("relay", "nft", "list", "ruleset") == ""
    assert "clsact" not in busy.run("relay", "tc", "qdisc", "show")
    after = busy.values("counters")
    assert after["U1"] - before["U1"] >= 2 * BUSY  # what the kernel has counted is kept
    assert len(socks) == 3


# Somebody else's hands in it


def take_out(*names: str) -> Callable[[World, Element], None]:
    """Takes all elements of these steps out of the map; of none: the one that is named."""

    def act(world: World, one: Element) -> None:
        with world.lab.enter("relay"):
            for each in bpfmaps.entries(table(world)):
                name = f"{each.proto}-{each.step.name.lower()}"
                if name in names or (not names and (name, each.src, each.dst) == one):
                    bpfmaps.take_out(table(world), each.key)

    return act


def run(*commands: str) -> Callable[[World, Element], None]:
    def act(world: World, one: Element) -> None:
        for command in commands:
            world.lab.run("relay", *command.format(table=table(world)).split())

    return act


HANDS = {
    "a step": take_out("udp-u12"),
    "an element": take_out(),
    "some steps": take_out("tcp-t1", "tcp-t4", "udp-u34"),
    "the programs of a link": run("tc qdisc del dev eth0 clsact"),
    "the ruleset": run("nft flush ruleset"),
}


@pytest.mark.parametrize("hand", HANDS.values(), ids=HANDS)
def test_what_another_program_takes_out_is_put_back_and_told_once(
    busy: World, hand: Callable[[World, Element], None]
) -> None:
    others = [fast_udp(busy) for _ in range(10)]
    udp, terminated, forwarded = fast_udp(busy), fast_tcp(busy, 80), fast_tcp(busy, 443)
    usual = elements(busy)
    one = ("udp-u12", f"{busy.client}:{udp.getsockname()[1]}", f"{busy.relay}:7")
    assert one in usual
    said = {sock: flow(busy, sock)["packets"][0] for sock in (*others, udp)}
    totals = busy.complete(lambda: busy.values("counters"))
    rules = busy.rules()
    of_rules, of_links = hand is HANDS["the ruleset"], hand is HANDS["the programs of a link"]

    for _ in range(3):
        for sock in others:
            busy.exchange(sock, b"counted", (busy.relay, 7))
            said[sock] += 1
        hand(busy, one)
        if of_rules:  # what is sent without rules is refused
            busy.until(lambda: busy.rules() == rules, "rules")
        if of_rules or of_links:
            busy.until(lambda: attached(busy) and elements(busy) == usual, "all in the kernel")
        echo(terminated, b"goes on")
        echo(forwarded, b"goes on")
        busy.exchange(udp, b"goes on", (busy.relay, 7))
        busy.until(lambda: elements(busy) == usual, "all in the kernel again")

    output = busy.krelay_process.output  # a warning comes once in ten seconds
    if of_rules:
        assert output.count(FLUSHED) == 1
        assert output.count(LOST) <= 1
    else:
        assert (output.count(LOST), output.count(FLUSHED)) == (not of_links, 0)
    after = busy.values("counters")
    assert all(after[step] >= totals[step] for step in ("T1", "T4", "U1", "U4"))
    assert after["errors"] == 0
    if not of_rules and hand is not HANDS["a step"]:
        counted = {sock: flow(busy, sock)["packets"][0] for sock in others}
        assert counted == {sock: said[sock] for sock in others}, "what nobody took was counted"


def attached(world: World) -> bool:
    """Whether all links of the relay have the programs."""
    with world.lab.enter("relay"), closing(Attachment(table(world))) as attachment:
        return {each.number for each in attachment.links()} == attachment.attached().keys()


def test_the_worker_has_all_where_the_map_is_emptied_again_and_again(busy: World) -> None:
    udp, terminated = fast_udp(busy), fast_tcp(busy, 80)
    usual = elements(busy)
    for left in reversed(range(MOST_LOSSES)):
        assert busy.in_kernel
        HANDS["a step"](busy, ("", "", ""))
        if left:
            busy.until(lambda: elements(busy) == usual, "all in the kernel again")
    busy.until(lambda: not busy.in_kernel, "that it is given up")

    assert (
        busy.values("status")["datapath"] == "queue (the kernel's maps were lost again and again)"
    )
    busy.until(lambda: not elements(busy), "nothing in the kernel")
    echo(terminated, b"goes on")
    assert busy.exchange(udp, b"goes on", (busy.relay, 7)) == b"goes on"
    busy.put(start=0)
    busy.put(start=1)
    busy.until_state("running")
    assert busy.in_kernel


# Switched while it runs


class Talk:
    """Datagrams without pause, many of them under way at any time; each is answered."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.udp = world.open("client", socket.SOCK_DGRAM)
        self.udp.connect((world.relay, 7))
        self.asked = self.answered = 0
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=run, daemon=True) for run in (self._ask, self._take)
        ]
        for thread in self._threads:
            thread.start()

    def _ask(self) -> None:
        while not self._over.wait(0.0003):
            if self.asked - self.answered < UNDER_WAY:
                self.udp.send(DATAGRAM)
                self.asked += 1

    def _take(self) -> None:
        self.udp.settimeout(1)
        with suppress(TimeoutError):
            while self.udp.recv(100):
                self.answered += 1

    def has_asked(self, times: int) -> bool:
        """Whether it has gone on for so long."""
        return self.asked >= times

    def end(self) -> None:
        """Ends it, and waits for the last answers."""
        self._over.set()
        for thread in self._threads:
            thread.join()


def test_the_data_path_is_switched_under_running_flows_and_nothing_is_lost(busy: World) -> None:
    talk = Talk(busy)
    with busy.connect("client", 80) as tcp:
        greet(tcp)
        busy.until(lambda: elements(busy), "flows in the kernel")
        for datapath in ("queue", "auto") * 3:
            busy.put(datapath=datapath)
            assert busy.in_kernel == (datapath == "auto")
            if datapath == "queue":
                busy.until(lambda: not elements(busy), "nothing in the kernel")
            echo(tcp, datapath.encode())
            busy.until(partial(talk.has_asked, talk.asked + 500), "some more")
    talk.end()

    assert talk.answered == talk.asked
    found = flow(busy, talk.udp)
    assert found["packets"] == [talk.asked, talk.asked]
    assert found["bytes"] == [talk.asked * (28 + len(DATAGRAM))] * 2
    counters = busy.values("counters")
    assert (counters["U1"], counters["U4"]) == (talk.asked, talk.asked)


# krelay is killed


def test_flows_in_the_kernel_outlive_krelay_and_others_wait(busy: World) -> None:
    udp, terminated, forwarded = fast_udp(busy), fast_tcp(busy, 80), fast_tcp(busy, 443)
    slow = busy.open("client", socket.SOCK_DGRAM)
    busy.exchange(slow, b"once", (busy.relay, 7))
    with nothing_unrewritten(busy):
        busy.kill(busy.krelay_process)
        for _ in range(20):
            assert busy.exchange(udp, b"goes on", (busy.relay, 7)) == b"goes on"
            echo(terminated, b"goes on")
            echo(forwarded, b"goes on")
        for sock in (slow, busy.open("client", socket.SOCK_DGRAM)):
            sock.settimeout(0.3)
            sock.sendto(b"waits", (busy.relay, 7))
            with pytest.raises(TimeoutError):
                sock.recv(10)
        new = busy.open("client")
        new.setblocking(False)
        with suppress(BlockingIOError):
            new.connect((busy.relay, 80))
        revive(busy)
        new.settimeout(10)
        busy.until(lambda: b"tcp" in greeting(new), "a connection that waited")
        for _ in range(20):
            echo(terminated, b"goes on")
            echo(forwarded, b"goes on")
            assert busy.exchange(udp, b"goes on", (busy.relay, 7)) == b"goes on"
    until_fast(busy, lambda: echo(terminated, b"fast again"))
    until_fast(busy, lambda: echo(forwarded, b"fast again"))
    until_fast(busy, lambda: busy.exchange(udp, b"fast again", (busy.relay, 7)))


def greeting(sock: socket.socket) -> bytes:
    """Asks our server who we are, as soon as there is a connection."""
    with suppress(OSError):
        return b"tcp " + greet(sock).encode()
    return b""


# The two tables agree


class Watch:
    """Compares the kernel's elements with the flows, again and again."""

    def __init__(self, world: World) -> None:
        self.looks = 0
        self.most = 0
        self.longest = 0.0
        self.wrong = ""
        self.error: Exception | None = None
        self._world = world
        self._since: dict[tuple[str, Element], float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over.wait(0.05):
                self.look()
        except Exception as error:
            self.error = error

    def look(self) -> None:
        """What differs now, and didn't an instant ago, began to differ after that."""
        began = time.monotonic()
        before, there, after = self._world.flows(), elements(self._world), self._world.flows()
        may = {each for flows in (before, after) for flow in flows for each in wanted(flow)}
        must = {each for flow in before for each in needed(flow)}
        must &= {each for flow in after for each in needed(flow)}
        now = {("stale", each) for each in there - may} | {("missing", e) for e in must - there}
        self._since = {each: self._since.get(each, began) for each in now}
        for each, since in self._since.items():
            if began - since > self.longest:
                self.longest, self.wrong = began - since, str(each)
        self.looks += 1
        self.most = max(self.most, len(there))

    def end(self) -> None:
        self._over.set()
        self._thread.join()
        assert self.error is None, self.error


@contextmanager
def watched(world: World) -> Iterator[Watch]:
    watch = Watch(world)
    try:
        yield watch
    finally:
        watch.end()


@pytest.mark.serial
def test_the_table_and_the_kernel_never_disagree_for_long_while_flows_come_and_go(
    busy: World,
) -> None:
    busy.put(timeouts__udp=4, timeouts__tcp_transitory=3)
    with watched(busy) as watch:
        for round_ in range(4):
            with ExitStack() as socks:
                udp = []
                for number in range(500):
                    with busy.lab.enter("client"):
                        sock = socks.enter_context(socket.socket(type=socket.SOCK_DGRAM))
                    sock.settimeout(10)
                    sock.connect((busy.relay, 7))
                    udp.append(sock)
                    for _ in range(BUSY + number % 3):
                        sock.send(b"question")
                        sock.recv(100)
                    if not number % 10:
                        short_connection(busy, (80, 443)[number % 20 == 0], round_)
                for sock in udp[::2]:
                    sock.send(b"again")
                    sock.recv(100)
            if round_ == 1:
                for each in busy.flows("proto=udp")[:50]:
                    busy.ask(f"kill {each['id']}")
        busy.until(lambda: not busy.flows("proto=udp"), "the end of all", 30)
    assert watch.looks > 10
    assert watch.most > 500
    assert watch.longest <= 1.0, watch.wrong
    busy.until(lambda: not elements(busy), "nothing in the kernel")
    assert not re.search("isn't as krelay left it|fault of ours", busy.krelay_process.output)


def short_connection(world: World, port: int, kind: int) -> None:
    """One that is opened, says something, and ends in one of the ways that there are."""
    with world.connect("client", port) as sock:
        assert greet(sock).startswith(world.client)
        if kind == 1:
            sock.shutdown(socket.SHUT_WR)
            assert sock.recv(1) == b""
        elif kind == 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


def test_the_gateway_port_is_nobodys_but_tcp_relays(busy: World) -> None:
    """Its packets pass by elements of the flows alone, whoever else has a connection there."""
    fast_tcp(busy, 80)
    with pytest.raises(ConnectionRefusedError):
        busy.connect("client", GPORT)
