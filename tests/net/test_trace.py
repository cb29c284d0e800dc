"""Traces and captures of real packets: against the counters, the wires, and tshark's reckoning."""

import re
import shlex
import signal
import socket
from collections import Counter
from pathlib import Path

import pytest

from krelay_vm import Program
from tests.net.world import PYTHON, World, control_socket, greet, upload
from tests.tools.captures import Read, assert_sound, need_tshark, slow_read, tshark

pytestmark = pytest.mark.net

ETHERNET = 14
SIDES = ("client side", "inside", "server side")


def capture(world: World, file: str, *filters: str) -> Program:
    """`krelay trace --pcap FILE`, until it captures."""
    command = (*PYTHON, "-m", "krelay", "trace", "--root", str(world.root), "--pcap", file)
    program = world.lab.start("relay", *command, *filters)
    world.until(lambda: "capturing into" in program.output, "a capture")
    world.until(lambda: "client side" in Path(file).read_bytes().decode("latin-1"), "its beginning")
    return program


def ended(world: World, program: Program, file: Path) -> list[Read]:
    """Ctrl-C; all that is in the file."""
    program.signal(signal.SIGINT)
    assert program.wait() == 130
    assert "Traceback" not in program.output
    return slow_read(file.read_bytes())


def frames(blocks: list[Read], place: str) -> list[Read]:
    """The packets of one place."""
    return [block for block in blocks if block.interface == SIDES.index(place) and block.data]


def test_a_capture_has_what_was_counted_and_what_the_wires_had(shared: World) -> None:
    need_tshark()
    shared.who("client2", 80)  # steps are counted, but not in the capture
    shared.until(lambda: shared.flows("state=closed"), "its end")
    before = shared.complete(lambda: shared.values("counters"))
    file = shared.lab.directory / "trace.pcapng"
    program = capture(shared, str(file))
    with shared.lab.capture("client") as client, shared.lab.capture("server") as server:
        shared.who_udp("client", 7)
        sock = shared.connect("client", 80)
        upload(sock, 1, 100_000)
        with shared.connect("client", 80) as sock:
            greet(sock)
        shared.until(lambda: len(shared.flows("state=closed")) == 3, "their end")
        after = shared.complete(lambda: shared.values("counters"))
        blocks = ended(shared, program, file)
        arrived = {"client side": received(client), "server side": received(server)}

    steps = Counter(block.comments[0].split()[0] for block in blocks if block.kind == "packet")
    for step in ("T1", "T2", "T3", "T4"):
        assert steps[step] == 2 * (after[step] - before[step]) > 0, step
    assert steps["U1,U2"] == steps["U3,U4"] == 2
    for place, packets in arrived.items():
        sent = [block.data for block in frames(blocks, place) if block.numbers["flags"] == 2]
        assert Counter(map(unrouted, sent)) == Counter(map(unrouted, packets)), place
    assert f"{len([b for b in blocks if b.kind == 'packet'])} frames" in program.output
    assert "lost" not in program.output

    assert_sound(file)
    pairs = tshark(file, "ip.src_host", "ip.dst_host", options=["-N", "n"])
    assert {end for pair in pairs for end in pair} == {"client", "relay", "server"}


def unrouted(packet: bytes) -> bytes:
    """A datagram without what forwarding changes: TTL and so the header's checksum."""
    return packet[:8] + packet[12:] if packet[9] == 17 else packet


def received(sock: socket.socket) -> list[bytes]:
    """The IPv4 packets of TCP and UDP that have arrived there."""
    sock.setblocking(False)
    found: list[bytes] = []
    while True:
        try:
            frame, address = sock.recvfrom(1 << 17)
        except BlockingIOError:
            return found
        packet = frame[ETHERNET:]
        if address[2] == socket.PACKET_HOST and frame[12:14] == b"\x08\0" and packet[9] in (6, 17):
            found.append(packet[: int.from_bytes(packet[2:4])])


def test_wireshark_may_read_along(shared: World) -> None:
    need_tshark()
    trace = f"{shlex.join(PYTHON)} -m krelay trace --root {shared.root} proto=udp --pcap -"
    program = shared.lab.start(
        "relay", "sh", "-c", f"{trace} | tshark -l -n -i - -T fields -e frame.comment"
    )
    shared.until(lambda: "Capturing on" in program.output, "tshark")
    shared.until(lambda: shared.who_udp("client", 7) and "U1,U2" in program.output, "a packet")
    shared.until(lambda: "U3,U4 after flow" in program.output, "its answer")
    program.signal(signal.SIGINT)
    program.wait()

    assert "Traceback" not in program.output


@pytest.mark.parametrize("asked", ["trace", "trace pcap"])
def test_a_reader_that_does_not_read_disturbs_no_download_and_is_told_what_it_missed(
    shared: World, asked: str
) -> None:
    before = shared.values("counters")
    with control_socket(shared.root) as connection:
        connection.sendall(asked.encode() + b"\n")
        shared.download("client", 80, 7, 20_000_000).finish()
        shared.until(lambda: shared.flows("state=closed"), "its end")
        counters = shared.values("counters")
        shown = b""
        if asked == "trace":
            while b"lost" not in shown:
                shown += connection.recv(1 << 20)
            [told] = [int(line.split()[1]) for line in shown.splitlines() if b"lost" in line]
        else:
            connection.shutdown(socket.SHUT_WR)
            while data := connection.recv(1 << 20):
                shown += data
            ends = [block.numbers for block in slow_read(shown) if block.kind == "statistics"]
            told = sum(numbers["ifdrop"] for numbers in ends) // 2

    assert told == counters["trace_lost"] - before["trace_lost"] > 1000
    assert counters["queue_overflow"] == counters["socket_overflow"] == 0


def test_packets_that_are_dropped_are_shown_with_the_reason(shared: World) -> None:
    command = (*PYTHON, "-m", "krelay", "trace", "--root", str(shared.root), "verdict=drop")
    program = shared.lab.start("relay", *command, f"client={shared.client}")

    def refused() -> bool:
        with pytest.raises(ConnectionRefusedError):
            shared.connect("client2", 18000)
        with pytest.raises(ConnectionRefusedError):
            shared.connect("client", 18000)
        return "drop" in program.output

    shared.until(refused, "a dropped packet")
    shared.who("client", 80)
    program.signal(signal.SIGINT)

    assert program.wait() == 130
    seen = f"drop gateway_port {shared.client}:PORT > {shared.relay}:18000 [S] answered [R.]"
    lines = {re.sub(r":\d+ >", ":PORT >", line) for line in program.output.splitlines()}
    assert lines == {seen}


def test_a_capture_can_be_had_with_socat_alone(world: World) -> None:
    world.start_krelay()
    file = world.lab.directory / "empty.pcapng"
    script = f"echo trace pcap | socat - UNIX-CONNECT:{world.root}/control.sock > {file}"
    world.lab.run("relay", "sh", "-c", script)

    kinds = [block.kind for block in slow_read(file.read_bytes())]
    assert kinds == ["section", *["interface"] * 3, *["statistics"] * 3]
