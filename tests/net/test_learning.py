"""Queries that the kernel relays without asking: they are relayed, counted and bounded as others.

What holds for all datagrams is shown with both data paths elsewhere; here is what only queries of
one packet can meet, and that it is indeed the kernel that relays them.
"""

import socket
from typing import Any

import pytest

from knet.endpoint import Endpoint, FiveTuple, Proto
from tests.net.test_datapaths import visits
from tests.net.world import SERVICES, World, control_socket
from tests.tools.packets import Template

pytestmark = [pytest.mark.net, pytest.mark.one_datapath("only the kernel learns")]

DNS = 53
DEAF = "table ip deaf {\n chain c {\n type filter hook input priority 0;\n drop\n }\n}\n"
RAW = (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)


@pytest.fixture
def asked(world: World) -> World:
    """A world whose relay has a name server behind it; ours echoes, from two servers."""
    for host in ("server", "server2"):
        world.serve(host, "udp/53")
    world.begin(services=SERVICES)
    return world


def test_queries_do_not_visit_the_worker_and_are_flows_all_the_same(asked: World) -> None:
    before = visits(asked)
    for port in range(20001, 20021):
        assert asked.who_udp("client", DNS, bind=port) == f"{asked.client}:{port}"
    assert visits(asked) == before
    flows = asked.soon(
        lambda: found if len(found := asked.flows("service=udp/53")) == 20 else None,
        "twenty rows",
    )

    assert [flow["client"] for flow in flows] == [
        f"{asked.client}:{p}" for p in range(20001, 20021)
    ]
    answer = len(f"{asked.client}:20001\n")
    assert all((flow["packets"], flow["state"]) == ([1, 1], "replied") for flow in flows)
    assert all(flow["bytes"] == [28 + len(b"who"), 28 + answer] for flow in flows)
    assert len({flow["id"] for flow in flows}) == 20
    counters = asked.values("counters")
    assert (counters["U1"], counters["U3"]) == (20, 20)
    assert asked.ask(f"kill {flows[3]['id']}") == [f"killed={flows[3]['id']}"]
    assert len(asked.flows("service=udp/53")) == 19


def test_a_second_answer_finds_its_way_too(asked: World) -> None:
    with asked.open("client", socket.SOCK_DGRAM) as sock:
        sock.bind(("", 21000))
        asked.exchange(sock, b"who", (asked.relay, DNS))
        again = FiveTuple(
            Proto.UDP, Endpoint.of(asked.server, DNS), Endpoint.of(asked.client, 21000)
        )
        with asked.lab.enter("server"), socket.socket(*RAW) as raw:
            raw.sendto(Template(again, payload=b"again").build(), (asked.client, 0))
        assert sock.recvfrom(100) == (b"again", (asked.relay, DNS))

    def packets() -> list[list[int]]:
        return [flow["packets"] for flow in asked.flows(f"client={asked.client}:21000")]

    asked.soon(lambda: packets() == [[1, 2]], "both answers in its row")


def test_the_same_port_towards_the_server_itself_is_another_conversation(asked: World) -> None:
    with asked.open("client", socket.SOCK_DGRAM) as sock:
        sock.bind(("", 22000))
        for _ in range(3):
            assert asked.exchange(sock, b"who", (asked.relay, DNS)).decode().strip() == (
                f"{asked.client}:22000"
            )
            there = asked.exchange(sock, b"who", (asked.server, DNS)).decode().strip()
            assert there.startswith(asked.client)
        for _ in range(3):  # and begun the other way round
            assert asked.exchange(sock, b"who", (asked.server, DNS))
            assert asked.exchange(sock, b"who", (asked.relay, DNS))


def test_the_same_port_towards_two_addresses_of_the_relay_is_two_conversations(
    asked: World,
) -> None:
    other = asked.lab.address("relay", "client")
    assert other != asked.relay
    with asked.open("client", socket.SOCK_DGRAM) as sock:
        sock.bind(("", 23000))
        for to in (asked.relay, other, asked.relay, other, other):
            asked.exchange(sock, b"who", (to, DNS))
        for to in (asked.relay, other):  # both under way at a time
            sock.sendto(b"who", (to, DNS))
        peers = {sock.recvfrom(100)[1] for _ in range(2)}
        assert peers == {(asked.relay, DNS), (other, DNS)}


def test_who_traces_sees_each_packet_and_others_are_not_disturbed(asked: World) -> None:
    with control_socket(asked.root) as tracing, tracing.makefile() as lines:
        tracing.sendall(b"trace client=%s\n" % asked.client.encode())
        asked.ask("show status")  # which is answered after the trace has begun
        for port in (24001, 24002):
            asked.who_udp("client", DNS, bind=port)
        seen = [next(lines).split()[0] for _ in range(4)]

    assert seen == ["U1,U2", "U3,U4"] * 2
    asked.until(lambda: not does_visit(asked), "the client is the kernel's again")


def does_visit(world: World) -> bool:
    """Whether a query of the client's visits the worker."""
    before = visits(world)
    world.who_udp("client", DNS)
    return visits(world) > before


def test_an_unanswered_query_that_is_asked_again_goes_to_the_new_server(asked: World) -> None:
    with asked.open("client", socket.SOCK_DGRAM) as sock:
        sock.bind(("", 25000))
        asked.nft("server", DEAF)
        sock.sendto(b"who", (asked.relay, DNS))
        asked.soon(lambda: asked.flows("state=unreplied"), "a question without an answer")
        there = asked.lab.address("server2")
        asked.put(real_ip=there)
        asked.exchange(sock, b"who", (asked.relay, DNS))

    (flow,) = asked.soon(lambda: asked.flows("service=udp/53"), "its row")
    assert (flow["server"], flow["state"]) == (f"{there}:{DNS}", "replied")


@pytest.mark.parametrize(
    ("name", "value"), [("limits__new_flows_per_client", 1000), ("source", "relay")]
)
def test_where_the_worker_has_more_to_decide_it_does(
    asked: World, name: str, value: object
) -> None:
    setting: dict[str, Any] = {name: value}
    asked.put(**setting)
    before = visits(asked)
    asked.who_udp("client", DNS)

    assert visits(asked) > before
