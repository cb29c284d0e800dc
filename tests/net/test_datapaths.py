"""One truth on both data paths: flows, counters, expiry and traces tell what has passed."""

import os
import re
import socket
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest

from tests.net.test_cases import flow_of
from tests.net.world import World, control_socket, echo, greet, upload

pytestmark = pytest.mark.net

STEPS = ("T1", "T2", "T3", "T4")
MANY = 200
PAYLOAD = 700
SIZE = 5_000_000
MSS = 1448
MB = 1 << 20
LONG = bool(os.environ.get("KRELAY_LONG"))
DOWNLOAD, RATE = (1000 * MB, 200 * MB) if LONG else (40 * MB, 20 * MB)


@pytest.fixture
def busy(world: World) -> World:
    """Relaying all that our server serves."""
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    world.begin(services="tcp/80 tcp/443=forward udp/7 udp/53")
    return world


def udp_flow(world: World, sock: socket.socket) -> dict[str, Any] | None:
    """The flow of a client's datagrams, if there is one."""
    flows = world.flows(f"proto=udp client={world.client}:{sock.getsockname()[1]}")
    return flows[0] if flows else None


def visits(world: World) -> int:
    """Packets that the relay's queues have been given (net/netfilter/nfnetlink_queue.c)."""
    shown = world.run("relay", "cat", "/proc/net/netfilter/nfnetlink_queue")
    return sum(int(line.split()[7]) for line in shown.splitlines())


def test_the_setting_is_in_force_and_told(busy: World, datapath: str) -> None:
    assert busy.values("config")["datapath"] == datapath
    assert f"datapath={datapath}" in busy.krelay("get").stdout.splitlines()
    shown = str(busy.values("status")["datapath"])
    assert re.search(rf"^datapath +{re.escape(shown)}$", busy.krelay("status").stdout, re.M)


def test_datagrams_are_counted_to_the_byte(busy: World) -> None:
    before = busy.complete(lambda: busy.values("counters"))
    with busy.open("client", socket.SOCK_DGRAM) as sock:
        for number in range(MANY):
            data = number.to_bytes(2) * (PAYLOAD // 2)
            assert busy.exchange(sock, data, (busy.relay, 7)) == data

        def counted() -> bool:
            flow, after = udp_flow(busy, sock), busy.values("counters")
            assert flow is not None
            assert max(flow["packets"]) <= MANY
            return (
                flow["packets"] == [MANY, MANY]
                and flow["bytes"] == [MANY * (20 + 8 + PAYLOAD)] * 2
                and {after[step] - before[step] for step in ("U1", "U2", "U3", "U4")} == {MANY}
            )

        busy.soon(counted, "each datagram counted once")


def sent_again(world: World) -> int:
    """Segments that client and server have sent more than once."""
    found = 0
    for host in ("client", "server"):
        lines = world.run(host, "cat", "/proc/net/snmp").splitlines()
        names, values = (line.split() for line in lines if line.startswith("Tcp:"))
        found += int(values[names.index("RetransSegs")])
    return found


@pytest.mark.parametrize("port", [80, 443], ids=["terminated", "forwarded"])
def test_a_connections_bytes_are_those_of_its_flow(busy: World, port: int) -> None:
    """Headers are counted once a packet, and who segments may be anybody on the way."""
    before = sent_again(busy)
    begun = busy.connect("client", port), busy.connect("client", port)
    numbers = [flow_of(busy, sock)["id"] for sock in begun]
    upload(begun[0], 1, SIZE)
    begun[1].sendall(f"download 2 {SIZE} 0\n".encode())
    with begun[1].makefile("rb") as content:
        assert len(content.read()) == SIZE
    begun[1].close()

    again = sent_again(busy) - before
    most = SIZE + 120 * (SIZE // MSS + 50) + again * (MSS + 120)  # headers, and what came twice

    def counted() -> bool:
        flows = {flow["id"]: flow for flow in busy.flows("proto=tcp")}
        sent, got = (flows[number]["bytes"] for number in numbers)
        return bool(SIZE < sent[0] < most and SIZE < got[1] < most)

    busy.soon(counted, "all bytes counted")


def test_what_the_kernel_was_given_is_withdrawn_when_its_flow_ends(busy: World) -> None:
    with (
        busy.connect("client", 80) as terminated,
        busy.connect("client", 443) as forwarded,
        busy.open("client", socket.SOCK_DGRAM) as udp,
    ):
        for sock in (terminated, forwarded):
            greet(sock)
            echo(sock, b"established")
        for _ in range(5):
            busy.exchange(udp, b"replied", (busy.relay, 7))
        busy.soon(lambda: bool(busy.handed()) == busy.in_kernel, "flows in the kernel or none")
        for flow in busy.flows():
            busy.ask(f"kill {flow['id']}")
        busy.soon(lambda: not busy.handed(), "none any more")
        for sock in (terminated, forwarded):
            with pytest.raises(ConnectionResetError):
                sock.recv(1)
    assert busy.who("client", 80).startswith(f"{busy.client}:")
    busy.put(start=0)
    busy.until_state("stopped")
    assert not busy.handed()


def test_a_conversation_lives_while_it_talks_and_its_timeout_longer(busy: World) -> None:
    busy.put(timeouts__udp=4)
    with busy.open("client", socket.SOCK_DGRAM) as sock:
        busy.exchange(sock, b"first", (busy.relay, 7))
        flow = udp_flow(busy, sock)
        assert flow is not None
        for _ in range(10):
            time.sleep(0.5)  # as people do; five seconds in all
            assert busy.exchange(sock, b"next", (busy.relay, 7)) == b"next"
            now = udp_flow(busy, sock)
            assert now is not None
            assert now["id"] == flow["id"]
        busy.until(lambda: udp_flow(busy, sock) is None, "its end")
        assert busy.exchange(sock, b"anew", (busy.relay, 7)) == b"anew"
        again = busy.until(lambda: udp_flow(busy, sock), "a new row")
        assert again["id"] != flow["id"]


@pytest.mark.parametrize("port", [80, 443], ids=["terminated", "forwarded"])
def test_a_running_download_visits_the_queue_with_each_packet_or_with_none(
    busy: World, port: int
) -> None:
    download = busy.download("client", port, 3, DOWNLOAD, rate=RATE)
    busy.until(lambda: download.received > DOWNLOAD // 8, "a download under way")
    before, begun = visits(busy), download.received
    busy.until(lambda: download.received > DOWNLOAD * 3 // 4, "most of it", 60)
    size = download.received - begun  # what has come by now has visited by now
    packets = visits(busy) - before
    if busy.in_kernel:
        assert packets == 0
    else:
        assert packets > size // MSS
    download.finish()


def test_a_trace_takes_its_own_flows_back_and_leaves_the_others(busy: World) -> None:
    others = busy.lab.address("client2")

    def quiet(sock: socket.socket) -> bool:
        """Whether what is said there doesn't visit the queue."""
        before = visits(busy)
        for _ in range(20):
            echo(sock, b"said")
        return visits(busy) == before

    def still() -> bool:
        """Whether the last acknowledgements, which take their time, have come."""
        before = visits(busy)
        time.sleep(0.1)
        return visits(busy) == before

    with busy.connect("client", 80) as one, busy.connect("client2", 80) as other:
        greet(one)
        greet(other)
        busy.soon(lambda: quiet(one) == quiet(other) == busy.in_kernel, "both offloaded or none")
        with control_socket(busy.root) as trace, trace.makefile() as lines:
            trace.sendall(f"trace client={others}\n".encode())
            busy.until(lambda: not quiet(other), "the traced one in the queue")
            busy.until(still, "an end of that")
            assert quiet(one) == busy.in_kernel
            assert others in next(lines)
        busy.soon(lambda: quiet(other) == busy.in_kernel, "offloaded again")
        assert quiet(one) == busy.in_kernel


def test_a_trace_that_begins_late_has_each_packet_from_then_on(busy: World) -> None:
    size = {"udp": 222, "tcp": 333}
    with busy.connect("client", 80) as tcp, busy.open("client", socket.SOCK_DGRAM) as udp:
        greet(tcp)
        for _ in range(5):
            echo(tcp, b"before")
            busy.exchange(udp, b"before", (busy.relay, 7))
        with control_socket(busy.root) as trace:
            trace.sendall(f"trace client={busy.client}\n".encode())
            trace.settimeout(0.05)
            shown = ""

            def more() -> str:
                nonlocal shown
                with suppress(TimeoutError):
                    shown += trace.recv(1 << 20).decode()
                return shown

            def begun() -> bool:
                echo(tcp, b"begun")
                busy.exchange(udp, b"begun", (busy.relay, 7))
                return all(step in more() for step in (*STEPS, "U1,U2", "U3,U4"))

            busy.until(begun, "a trace of both")
            for _ in range(10):
                echo(tcp, bytes(size["tcp"]))
                assert busy.exchange(udp, bytes(size["udp"]), (busy.relay, 7))

            def traced() -> Counter[str]:
                found = Counter[str]()
                for line in more().splitlines():
                    if f" {size['udp']} bytes " in line or f" {size['tcp']} bytes " in line:
                        found[line.split()[0]] += 1
                return found

            wanted = Counter(dict.fromkeys((*STEPS, "U1,U2", "U3,U4"), 10))
            busy.until(lambda: traced() == wanted, f"{wanted}, not {traced()}")
        echo(tcp, b"after")
        assert busy.exchange(udp, b"after", (busy.relay, 7)) == b"after"
