"""What a host is on its network, looked at in a lab; and that changes there are noticed.

client 10.0.0.1 ---- 10.0.0.254 relay 192.168.0.2 ---- 192.168.0.1 server
"""

import errno
import os
import resource
import select
from collections.abc import Iterator
from contextlib import closing
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from knet import netlink
from krelay.host.hostview import HostView
from krelay.host.links import MOST_LOCAL, LinkWatcher, LocalAddresses, Looker
from krelay_vm import Lab

pytestmark = pytest.mark.net

GET_ADDRESSES = 22
"""RTM_GETADDR (linux/rtnetlink.h)."""
SERVER = IPv4Address("192.168.0.1")
RELAY = (IPv4Address("10.0.0.254").packed, IPv4Address("192.168.0.2").packed)


@pytest.fixture(scope="module")
def quiet() -> Iterator[Lab]:
    """For tests that change nothing."""
    with Lab() as lab:
        yield lab


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab() as lab:
        yield lab


@pytest.fixture
def watcher(lab: Lab) -> Iterator[LinkWatcher]:
    with lab.enter("relay"):
        watcher = LinkWatcher()
    with closing(watcher):
        yield watcher


def seen(lab: Lab, host: str, server: IPv4Address = SERVER) -> HostView:
    with lab.enter(host), closing(Looker()) as looker:
        return looker.look(server)


def test_a_server_on_the_link_has_neighbours(quiet: Lab) -> None:
    view = seen(quiet, "relay")

    assert view.own == set(RELAY)
    assert view.beside == (IPv4Network("192.168.0.0/24"),)
    assert view.towards == RELAY[1]


def test_the_mtu_is_that_of_the_link_towards_the_server(lab: Lab) -> None:
    assert seen(lab, "relay").mtu == 1500
    lab.run("relay", "ip", "link", "set", "eth1", "mtu", "1400")
    assert seen(lab, "relay").mtu == 1400
    assert seen(lab, "relay", IPv4Address("10.0.0.1")).mtu == 1500


def test_a_server_behind_a_gateway_has_none(quiet: Lab) -> None:
    view = seen(quiet, "client")
    own = IPv4Address("10.0.0.1").packed

    assert view == view._replace(own=frozenset({own}), beside=(), towards=own)


def test_without_a_route_there_is_no_address_towards_the_server(quiet: Lab) -> None:
    view = seen(quiet, "relay", IPv4Address("203.0.113.1"))

    assert view == view._replace(own=frozenset(RELAY), beside=(), towards=None)


def test_loopback_is_no_address_of_ours_to_speak_of(lab: Lab) -> None:
    lab.run("relay", "ip", "addr", "add", "127.0.0.5/32", "dev", "lo")
    lab.run("relay", "ip", "addr", "add", "203.0.113.7/32", "dev", "lo")

    assert seen(lab, "relay").own == {*RELAY, IPv4Address("203.0.113.7").packed}


def test_another_subnet_on_the_servers_link_lies_beside_it_and_one_elsewhere_does_not(
    lab: Lab,
) -> None:
    lab.run("relay", "ip", "addr", "add", "172.16.5.1/28", "dev", "eth1")
    lab.run("relay", "ip", "addr", "add", "172.16.6.1/24", "dev", "eth0")
    lab.run("relay", "ip", "route", "add", "172.16.7.0/24", "via", str(SERVER))
    view = seen(lab, "relay")

    assert set(view.beside) == {IPv4Network("192.168.0.0/24"), IPv4Network("172.16.5.0/28")}
    assert view.towards == RELAY[1]


def test_the_preferred_source_of_the_route_is_the_address_towards_the_server(lab: Lab) -> None:
    lab.run("relay", "ip", "addr", "add", "192.168.0.77/32", "dev", "eth1")
    lab.run("relay", "ip", "route", "replace", f"{SERVER}/32", "dev", "eth1", "src", "192.168.0.77")

    assert seen(lab, "relay").towards == IPv4Address("192.168.0.77").packed


@pytest.mark.parametrize(
    "change",
    [
        ("addr", "add", "172.16.5.1/28", "dev", "eth1"),
        ("route", "add", "203.0.113.0/24", "via", "192.168.0.1"),
        ("link", "set", "eth1", "down"),
    ],
)
def test_a_change_makes_the_watcher_readable_until_it_is_drained(
    lab: Lab, watcher: LinkWatcher, change: tuple[str, ...]
) -> None:
    readable = select.poll()
    readable.register(watcher.fileno(), select.POLLIN)

    def is_drained() -> bool:
        """The kernel tells of some changes by and by: what IPv6 makes of a new link, for one."""
        for _ in range(50):
            if not readable.poll(100):
                return True
            watcher.drain()
        return False

    assert is_drained()
    lab.run("relay", "ip", *change)

    assert readable.poll(5000) != []
    assert is_drained()
    watcher.drain()


def test_a_watcher_that_missed_something_is_drained_all_the_same(
    lab: Lab, watcher: LinkWatcher
) -> None:
    script = (
        "for i in $(seq 1500); do echo route add 203.0.$((i / 250)).$((i % 250)) dev eth1; done"
    )
    lab.run("relay", "sh", "-c", f"{script} | ip -batch -", timeout=20)
    readable = select.poll()
    readable.register(watcher.fileno(), select.POLLIN)

    assert readable.poll(5000)[0][1] & select.POLLERR  # ENOBUFS: its buffer was full
    watcher.drain()
    assert readable.poll(0) == []


def test_the_table_of_routes_is_never_read_as_a_whole(
    quiet: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a router it takes seconds, and no packet is relayed meanwhile."""
    asked: list[bytes] = []
    request = netlink.request

    def noted(kind: int, flags: int, body: bytes, *, sequence: int = 0) -> bytes:
        if flags & netlink.DUMP:
            asked.append(kind.to_bytes())
        return request(kind, flags, body, sequence=sequence)

    monkeypatch.setattr(netlink, "request", noted)
    assert seen(quiet, "relay").beside == (IPv4Network("192.168.0.0/24"),)
    assert asked == [GET_ADDRESSES.to_bytes()]


def test_a_host_without_a_descriptor_left_looks_all_the_same(quiet: Lab) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with quiet.enter("relay"), closing(Looker()) as looker:
        expected = looker.look(SERVER)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
            assert looker.look(SERVER) == expected
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("what", ["sendto", "recv"])
@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOMEM, errno.EPERM])
def test_a_look_that_fails_is_told_and_the_next_goes_well(
    quiet: Lab, what: str, number: int
) -> None:
    with quiet.enter("relay"), closing(Looker()) as looker:
        kernel = looker._socket

        class Failing:
            def __getattr__(self, name: str) -> Any:
                if name == what:
                    looker._socket = kernel
                    raise OSError(number, os.strerror(number))
                return getattr(kernel, name)

        looker._socket = Failing()  # type: ignore[assignment]
        with pytest.raises(OSError, match=os.strerror(number)):
            looker.look(SERVER)
        assert looker.look(SERVER).towards == RELAY[1]  # what came late is passed over


@pytest.mark.parametrize("kind", ["unreachable", "blackhole", "prohibit"])
def test_an_address_that_nothing_is_sent_to_has_no_way(lab: Lab, kind: str) -> None:
    lab.run("relay", "ip", "route", "add", kind, "203.0.113.0/24")
    assert seen(lab, "relay", IPv4Address("203.0.113.1")).towards is None


def test_a_link_with_two_ends_has_both(lab: Lab) -> None:
    lab.run("relay", "ip", "tuntap", "add", "tun0", "mode", "tun")
    lab.run("relay", "ip", "addr", "add", "10.8.0.1", "peer", "10.8.0.2", "dev", "tun0")
    lab.run("relay", "ip", "link", "set", "tun0", "up")
    view = seen(lab, "relay", IPv4Address("10.8.0.2"))

    assert IPv4Address("10.8.0.1").packed in view.own
    assert view.beside == (IPv4Network("10.8.0.2/32"),)


def test_whether_a_host_forwards_is_told(quiet: Lab) -> None:
    assert seen(quiet, "relay").forwards
    assert not seen(quiet, "client").forwards


def test_ports_that_the_host_has_reserved_are_told(lab: Lab) -> None:
    assert seen(lab, "relay").reserved == frozenset()
    lab.run("relay", "sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=8080,9148-9150")
    assert seen(lab, "relay").reserved == {8080, 9148, 9149, 9150}
    assert seen(lab, "client").reserved == frozenset()


# Asked at once


@pytest.fixture
def local(lab: Lab) -> Iterator[LocalAddresses]:
    with lab.enter("relay"):
        local = LocalAddresses()
    with closing(local):
        yield local


def test_the_kernel_knows_its_addresses_at_once(lab: Lab, local: LocalAddresses) -> None:
    arriving, other = (IPv4Address(each).packed for each in ("192.168.0.100", "192.168.0.101"))
    assert [local.has(each, 0.0) for each in (*RELAY, SERVER.packed)] == [True, True, False]
    assert local.has(arriving, 0.0) is False
    lab.run("relay", "ip", "addr", "add", "192.168.0.100/32", "dev", "eth1")
    assert local.has(arriving, 0.0) is False, "once a moment"
    assert local.has(arriving, 0.1) is True
    assert local.has(other, 0.1) is False
    lab.run("relay", "ip", "addr", "del", "192.168.0.100/32", "dev", "eth1")
    assert local.has(arriving, 0.2) is True, "until a change is told"
    local.forget()
    assert local.has(arriving, 0.2) is False


def test_a_network_may_be_local_by_a_route(lab: Lab, local: LocalAddresses) -> None:
    within, beyond = IPv4Address("10.1.2.3").packed, IPv4Address("10.2.0.1").packed
    lab.run("relay", "ip", "route", "add", "local", "10.1.0.0/16", "dev", "lo")
    assert (local.has(within, 0.0), local.has(beyond, 0.0)) == (True, False)


@pytest.mark.parametrize(
    "address", ["203.0.113.1", "224.0.0.1", "255.255.255.255", "192.168.0.255"]
)
def test_what_no_route_leads_to_is_not_local(local: LocalAddresses, address: str) -> None:
    assert local.has(IPv4Address(address).packed, 0.0) is False


def test_a_query_that_fails_is_no_answer(local: LocalAddresses) -> None:
    local.close()
    assert local.has(RELAY[0], 0.0) is None


def test_local_addresses_take_bounded_room(lab: Lab, local: LocalAddresses) -> None:
    lab.run("relay", "ip", "route", "add", "local", "10.1.0.0/16", "dev", "lo")
    for number in range(MOST_LOCAL + 10):
        assert local.has((0x0A010000 + number).to_bytes(4), 0.0) is True
    assert len(local._local) <= MOST_LOCAL


def test_reserved_ports_are_read_when_asked(lab: Lab) -> None:
    with lab.enter("relay"), closing(Looker()) as looker:
        assert looker.reserved() == frozenset()
        lab.run("relay", "sysctl", "-qw", "net.ipv4.ip_local_reserved_ports=80,8000-8001")
        assert looker.reserved() == {80, 8000, 8001}
