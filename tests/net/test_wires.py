"""What the wires show of a query and a request is what docs/virtual-machines.md says."""

import re
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from knet.wire import pcapng
from krelay_vm import DEFAULT
from tests.net.world import World
from tests.test_docs import table
from tests.tools.captures import count, need_tshark, tshark

pytestmark = pytest.mark.net

CLIENT, RELAY, SERVER = "10.0.0.1", "192.168.0.2", "192.168.0.1"
NAME, ADDRESS = "www.example.test", "192.0.2.7"
WIRES = ("client", "server")


@pytest.fixture(scope="module")
def captures(datapath: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """A capture of each wire while `dig` and then `curl` ask the relay."""
    need_tshark()
    folder = tmp_path_factory.mktemp("wires")
    with World(DEFAULT, datapath=datapath) as world:
        world.nginx("server", 80)
        world.dnsmasq("server", 53, {NAME: ADDRESS})
        world.begin(services="tcp/80 udp/53", gport=16000)
        with (
            closing(world.lab.capture("client")) as client,
            closing(world.lab.capture("server")) as server,
        ):
            asked = world.lab.run("client", "dig", "+short", "+tries=1", f"@{RELAY}", NAME)
            assert asked.stdout == f"{ADDRESS}\n"
            world.lab.run("client", "curl", "-sS", "--noproxy", "*", f"http://{RELAY}/page")
            world.until(
                lambda: [flow["state"] for flow in world.flows("proto=tcp")] == ["closed"],
                "the end",
            )
            files = {}
            for wire, frames in zip(WIRES, (client, server), strict=True):
                frames.setblocking(False)
                blocks = [pcapng.section(), pcapng.interface(wire)]
                with suppress(BlockingIOError):
                    while True:  # a millisecond apart
                        time = len(blocks) * 1_000_000
                        blocks.append(pcapng.packet(0, frames.recv(1 << 16), time))
                files[wire] = folder / f"{wire}.pcapng"
                files[wire].write_bytes(b"".join(blocks))
        yield files


@pytest.mark.parametrize("number", [0, 1], ids=WIRES)
def test_filters_show_what_the_page_says(captures: dict[str, Path], number: int) -> None:
    flows = table("| filter |")
    ((query, *_), *_) = tshark(captures["client"], "dns.id", only="dns")
    filters = [
        re.sub(r"dns\.id == \w+", f"dns.id == {query}", flow[0].strip("`").replace("\\|", "|"))
        for flow in flows
    ]
    everything, *shown = count(captures[WIRES[number]], ["ip", *filters])

    assert len(flows) == 10
    for flow, packets in zip(flows, shown, strict=True):
        cell = flow[1 + number]
        if cell.startswith("nothing"):
            assert packets == 0, flow
        elif cell == "all":
            assert packets == everything, flow
        else:
            assert 0 < packets < everything, flow


def test_a_query_keeps_its_port_and_ages(captures: dict[str, Path]) -> None:
    flows = table("| step | client's wire | server's wire |")
    fields = ("ip.src", "udp.srcport", "ip.dst", "udp.dstport", "ip.ttl")
    seen = {wire: tshark(captures[wire], *fields, only="dns") for wire in WIRES}
    port = seen["client"][0][1]

    assert seen["client"] == [(CLIENT, port, RELAY, "53", "64"), (RELAY, "53", CLIENT, port, "63")]
    assert seen["server"] == [
        (CLIENT, port, SERVER, "53", "63"),
        (SERVER, "53", CLIENT, port, "64"),
    ]
    assert [flow[0] for flow in flows] == ["U1", "U2", "U3", "U4"]
    order = [seen["client"][0], *seen["server"], seen["client"][1]]
    for flow, (src, _, dst, _, ttl) in zip(flows, order, strict=True):
        cell = "".join(flow[1:]).replace("*", "")
        assert re.match(rf"{src}:\d+ > {dst}:\d+, ", cell)
        assert cell.endswith(f"TTL {ttl}")


@pytest.mark.parametrize("number", [0, 1], ids=WIRES)
def test_a_request_is_two_connections(captures: dict[str, Path], number: int) -> None:
    flows = table("| step | client's wire, ")
    cells = [flow[1 + number] for flow in flows if flow[1 + number]]
    steps = {flow[0] for flow in flows if flow[1 + number]}
    wire, far = WIRES[number], (RELAY, SERVER)[number]
    fields = ("ip.src", "ip.dst", "tcp.flags", "tcp.len", "ip.ttl")
    seen = tshark(captures[wire], *fields, only="tcp.port == 80")

    assert steps == ({"T1", "T2"}, {"T3", "T4"})[number]
    assert {packet[:2] for packet in seen} == {(CLIENT, far), (far, CLIENT)}
    assert {packet[4] for packet in seen} == {"64"}
    # Acknowledgements travel alone or not, and either may close first; the rest is in order.
    assert sorted(_told(cells)) == sorted(
        {0x02: f"{sign} SYN", 0x12: f"{sign} SYN, ACK", 0x11: f"{sign} FIN, ACK"}.get(
            int(flags, 16), f"{sign} data"
        )
        for source, _, flags, length, _ in seen
        for sign in ("<>"[source == CLIENT],)
        if int(flags, 16) & 0x03 or int(length)
    )
    assert [cell.split(" ", 1)[1] for cell in cells[:3]] == ["SYN", "SYN, ACK", "ACK"]


def _told(cells: list[str]) -> list[str]:
    """The cells, but for acknowledgements; data as `> data`."""
    told = [f"{cell[0]} data" if "bytes" in cell else cell for cell in cells]
    return [cell for cell in told if cell[2:] != "ACK"]
