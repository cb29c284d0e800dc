"""A shared world is as at first after each test, or the test that left something fails."""

from collections.abc import Iterator

import pytest

from tests.net.conftest import SharedWorlds, relaying_world
from tests.net.sharing import Shared, tables
from tests.net.world import control_socket, greet

pytestmark = pytest.mark.net
looks_at_hosts = pytest.mark.one_datapath("what is looked for is the same")

LEFT = {
    "address": ("client", "ip addr add 10.7.3.7/24 dev eth0", "ip addr del 10.7.3.7/24 dev eth0"),
    "link": ("client", "ip link add left type veth peer name right", "ip link del left"),
    "mtu": ("server", "ip link set eth0 mtu 1400", "ip link set eth0 mtu 1500"),
    "route": ("client", "ip route add 10.9.0.0/16 dev eth0", "ip route del 10.9.0.0/16 dev eth0"),
    "routing rule": ("relay", "ip rule add pref 99 table 9", "ip rule del pref 99"),
    "neighbour": (
        "client",
        "ip neigh replace 172.20.5.77 lladdr 2:0:0:0:0:7 dev eth0",
        "ip neigh del 172.20.5.77 dev eth0",
    ),
    "sysctl": (
        "relay",
        "sysctl -qw net.ipv4.ip_default_ttl=63",
        "sysctl -qw net.ipv4.ip_default_ttl=64",
    ),
    "sysctl of a link": (
        "relay",
        "sysctl -qw net.ipv4.conf.eth0.rp_filter=2",
        "sysctl -qw net.ipv4.conf.eth0.rp_filter=0",
    ),
}


@pytest.fixture(scope="module")
def kept(datapath: str) -> Iterator[Shared]:
    with relaying_world(datapath) as world:
        yield Shared(world)


def test_what_a_test_did_is_put_back(kept: Shared) -> None:
    world = kept.world
    greet(world.connect("client", 80, bind=40000))
    world.who("client", 80, bind=40001)
    world.who_udp("client2", 7, bind=4000)
    assert world.counted()["T1"] >= 6
    program = world.lab.start("client", "sleep", "1000")
    for host in ("relay", "client"):
        world.nft(host, "table ip left { chain a { type filter hook input priority 0; }; }")
    trace = world.lab.start("relay", "sh", "-c", f"sleep 1000 | cat {world.root}/control.sock")
    world.put(real_ip=world.lab.address("server2"), timeouts__udp=9)
    world.write("gport", "nonsense")
    world.until(lambda: "gport" in world.read("status/errors"), "refused")
    world.until(lambda: "nonsense" in world.logged(), "a line of the log")
    kept.restore()
    assert (program.poll(), trace.poll()) == (-9, -9)
    assert not world.flows()
    assert "left" not in world.rules() + world.rules("client")
    assert world.applies("timeouts/udp", "300")
    assert world.applies("real_ip", world.server)
    assert [name for name, value in world.counted().items() if value and name[:4] != "tcp_"] == []
    assert world.logged() == ""
    assert world.who("client", 80, bind=40000).startswith(world.client)
    world.put(start=0)
    kept.restore()
    assert world.read("status/state") == "running"


@looks_at_hosts
@pytest.mark.parametrize("what", LEFT)
def test_what_stays_fails(kept: Shared, what: str) -> None:
    host, command, undo = LEFT[what]
    world = kept.world
    world.run(host, *command.split())
    try:
        with pytest.raises(AssertionError, match=rf"^{host}: "):
            kept.restore()
    finally:
        world.run(host, *undo.split())
    kept.restore()


def test_a_change_of_krelays_rules_fails(kept: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    world = kept.world
    table = next(line for line in tables(world.rules()) if "krelay" in line)
    world.nft("relay", f"{table} {{ chain left {{ }}; }}")
    with monkeypatch.context() as patch:
        patch.setattr(world, "patience", 0.5)
        with pytest.raises(AssertionError, match=r"^rules of relay"):
            kept.restore()
    world.nft("relay", f"delete {table.replace('table', 'chain')} left")
    kept.restore()


@looks_at_hosts
def test_a_trace_left_open_fails(kept: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    world = kept.world
    monkeypatch.setattr(world, "patience", 0.5)
    with control_socket(world.root) as connection:
        connection.sendall(b"trace\n")
        world.until(lambda: world.values("status")["traces"] == 1, "a trace")
        with pytest.raises(AssertionError, match="traces: 1, at first 0"):
            kept.restore()
    world.until(lambda: world.values("status")["traces"] == 0, "no trace")
    kept.restore()


@looks_at_hosts
def test_a_daemon_that_ended_fails(kept: Shared) -> None:
    kept.world.kill(kept.world.tcp_relay_process)
    with pytest.raises(AssertionError, match=r"^ended: .*tcp_relay"):
        kept.restore()


@looks_at_hosts
def test_after_a_failure_the_next_test_has_a_new_lab(datapath: str) -> None:
    worlds = SharedWorlds(lambda: relaying_world(datapath))
    try:
        with pytest.raises(AssertionError, match=r"^ended: "), worlds.lend() as spoilt:
            spoilt.kill(spoilt.krelay_process)
        with worlds.lend() as world:
            assert world is not spoilt
            world.who_udp("client", 7)
        with worlds.lend() as again:
            assert again is world
    finally:
        worlds.drop()
