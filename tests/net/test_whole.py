"""Datagrams that may be cut, since they don't forbid it: the kernel relays those that leave whole.

Where a packet goes out the kernel has cut it already, and the rest of a cut one has no ports.  So
where it comes in it is noted whether it fits (offload/programs/relay.c); all others visit the
worker, who is asked before they are cut.
"""

import socket

import pytest

from knet.endpoint import Endpoint, FiveTuple, Proto
from tests.net.test_datapaths import visits
from tests.net.test_learning import DEAF, DNS, RAW
from tests.net.world import SERVICES, World
from tests.tools.packets import Template

pytestmark = [pytest.mark.net, pytest.mark.one_datapath("with the other all visit the worker")]

LONG, SHORT = 1200, 500
FEWER = 1000
"""Bytes of a smaller path."""


@pytest.fixture
def may_be_cut(world: World) -> World:
    """A world whose hosts let routers cut what they send."""
    world.serve("server", "udp/7", "udp/53")
    world.begin(services=SERVICES)
    for host in ("client", "server"):
        world.lab.run(host, "sysctl", "-qw", "net.ipv4.ip_no_pmtu_disc=1")
    return world


def narrow(world: World) -> None:
    """The way from the relay to its client takes fewer bytes than its link."""
    link = f"{world.client.rpartition('.')[0]}.0/24"
    shown = world.lab.run("relay", "ip", "-o", "route", "show", link).stdout.split()
    world.lab.run("relay", "ip", "route", "change", *shown, "mtu", str(FEWER))


def offloaded(world: World, sock: socket.socket) -> None:
    """This socket's flow is the kernel's from now on."""

    def does_not_visit() -> bool:
        before = visits(world)
        world.exchange(sock, bytes(SHORT), (world.relay, 7))
        return visits(world) == before

    world.until(does_not_visit, "the flow is offloaded")


def is_cut_by_the_worker(world: World, sock: socket.socket) -> bool:
    """Whether a long answer is one that the worker has seen before it was cut."""
    before, patience = visits(world), sock.gettimeout()
    sock.settimeout(0.2)  # until krelay has heard of the route, it is lost
    try:
        return len(world.exchange(sock, bytes(LONG), (world.relay, 7))) == LONG and (
            visits(world) > before
        )
    except TimeoutError:
        return False
    finally:
        sock.settimeout(patience)


def test_what_fits_is_the_kernels_and_what_does_not_is_cut_all_the_same(may_be_cut: World) -> None:
    world = may_be_cut
    with world.open("client", socket.SOCK_DGRAM) as sock:
        offloaded(world, sock)
        before = visits(world)
        for size in (SHORT, LONG, 1472):
            assert len(world.exchange(sock, bytes(size), (world.relay, 7))) == size
        assert visits(world) == before

        narrow(world)
        world.until(lambda: is_cut_by_the_worker(world, sock), "krelay knows of it")
        for _ in range(3):
            assert is_cut_by_the_worker(world, sock)
        before = visits(world)
        assert len(world.exchange(sock, bytes(SHORT), (world.relay, 7))) == SHORT
        assert visits(world) == before
        assert len(world.exchange(sock, bytes(3000), (world.relay, 7))) == 3000, "in pieces"
    counters = world.values("counters")
    assert counters["errors"] == 0


@pytest.mark.parametrize("size", [SHORT, LONG])
@pytest.mark.parametrize("is_narrow", [False, True])
def test_a_long_answer_of_a_name_server_is_the_kernels_if_it_fits(
    may_be_cut: World, size: int, *, is_narrow: bool
) -> None:
    world = may_be_cut
    if is_narrow:
        narrow(world)
    world.nft("server", DEAF)
    with world.open("client", socket.SOCK_DGRAM) as sock:
        sock.bind(("", 26000))
        before = visits(world)
        sock.sendto(b"who", (world.relay, DNS))
        world.soon(lambda: world.flows("state=unreplied"), "the query")
        ends = FiveTuple(
            Proto.UDP, Endpoint.of(world.server, DNS), Endpoint.of(world.client, 26000)
        )
        answer = Template(ends, payload=bytes(size), fragment=0).build()
        with world.lab.enter("server"), socket.socket(*RAW) as raw:
            raw.sendto(answer, (world.client, 0))
        assert sock.recvfrom(2000) == (bytes(size), (world.relay, DNS))
        assert (visits(world) > before) == (is_narrow and size > FEWER)
