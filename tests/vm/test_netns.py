"""Namespaces: what is built is what was asked for, and nothing of it is the machine's own."""

import os
import subprocess
import threading

import pytest

from krelay_vm import Host, Lab, LabError, Link, Segment, Topology, netns, relay_topology
from krelay_vm.netns import inside

SERVE = """
import socket
s = socket.create_server(("", 5000))
c, _ = s.accept()
c.sendall(c.recv(100).upper())
c.close()
"""
ASK = """
import socket, sys
c = socket.create_connection((sys.argv[1], 5000), timeout=30)
c.sendall(b"hello")
print(c.recv(100).decode(), c.getsockname()[0])
"""


def talk(lab: Lab, asker: str, answerer: str) -> list[str]:
    """One TCP exchange; what the asker printed: the answer, and its own address."""
    lab.start(answerer, "python3", "-c", SERVE)
    lab.wait_listening(answerer, "tcp", 5000)
    return lab.run(asker, "python3", "-c", ASK, lab.address(answerer)).stdout.split()


def output(namespace: str, *argv: str) -> str:
    """What a command prints in a namespace that is no host."""
    command = netns.command(namespace, *argv)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def devices() -> str:
    """The root namespace's devices."""
    return subprocess.run(["ip", "-o", "link"], capture_output=True, text=True).stdout


@pytest.mark.net
def test_the_default_lab_forwards_between_client_and_server() -> None:
    with Lab() as lab:
        assert talk(lab, "client", "server") == ["HELLO", "10.0.0.1"]


@pytest.mark.net
def test_hosts_on_a_segment_reach_each_other_and_whats_behind_the_relay() -> None:
    with Lab(relay_topology(clients=2, servers=2, neighbours=1)) as lab:
        assert talk(lab, "neighbour", "server2") == ["HELLO", "192.168.0.254"]
        assert talk(lab, "client2", "server") == ["HELLO", "10.0.0.2"]


@pytest.mark.net
def test_ipv6_addresses_can_be_used_at_once() -> None:
    topology = Topology(
        (Host("a", gateway="fd00::2"), Host("b")), (Link("a fd00::1/64", "b fd00::2/64"),)
    )
    with Lab(topology) as lab:
        lab.start("b", "python3", "-c", SERVE.replace('("", 5000)', '("::", 5000), family=10'))
        lab.wait_listening("b", "tcp", 5000)
        answer = lab.run("a", "python3", "-c", ASK, "fd00::2").stdout.split()

    assert answer == ["HELLO", "fd00::1"]


@pytest.mark.net
def test_settings_and_mtu_are_those_of_the_topology() -> None:
    topology = relay_topology(
        mtu=1400, sysctls={"net.ipv4.conf.all.rp_filter": 2, "net.ipv4.conf.eth1.forwarding": 0}
    )
    with Lab(topology) as lab:

        def setting(host: str, path: str) -> str:
            return lab.run(host, "cat", f"/proc/sys/net/{path}").stdout.strip()

        assert setting("relay", "ipv4/ip_forward") == "1"
        assert setting("client", "ipv4/ip_forward") == "0"
        assert setting("relay", "ipv4/conf/all/rp_filter") == "2"
        assert setting("relay", "ipv4/conf/eth0/forwarding") == "1"
        assert setting("relay", "ipv4/conf/eth1/forwarding") == "0"
        for host, name in (("client", "eth0"), ("relay", "eth0"), ("server", "eth0")):
            assert "mtu 1400" in lab.run(host, "ip", "link", "show", name).stdout


@pytest.mark.net
def test_a_setting_the_kernel_refuses_is_an_error_that_leaves_nothing() -> None:
    before = netns_names()
    topology = relay_topology(sysctls={"net.ipv4.no_such_thing": 1})

    with pytest.raises(LabError, match=r"sysctl net\.ipv4\.no_such_thing=1"), Lab(topology):
        pass

    assert netns_names() == before


@pytest.mark.net
def test_no_device_shows_up_in_the_root_namespace() -> None:
    before = devices()
    seen: set[str] = set()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.update(os.listdir("/sys/class/net"))

    names = set(os.listdir("/sys/class/net"))
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with Lab(relay_topology(clients=2, servers=2)):
            during = devices()
    finally:
        done.set()
        watcher.join()

    assert seen == names
    assert before == during == devices()


@pytest.mark.net
def test_a_switch_is_a_namespace_of_the_labs_own() -> None:
    topology = Topology((Host("a"), Host("b")), (Segment("10.0.0.0/24", "a .1", "b .2"),))
    with Lab(topology) as lab:
        assert set(lab.record.namespaces) == {f"{lab.name}-{x}" for x in ("a", "b", "switch")}
        assert set(lab.record.namespaces) <= netns_names()
        ports = output(f"{lab.name}-switch", "ip", "-br", "link")
        details = output(f"{lab.name}-switch", "ip", "-d", "link", "show", "br0")

    assert "mcast_snooping 0" in details
    assert [line.split("@")[0].split()[0] for line in ports.splitlines()][1:] == [
        "br0",
        "0-a",
        "0-b",
    ]


@pytest.mark.net
def test_inside_moves_one_thread_and_comes_back() -> None:
    def here() -> int:
        return os.stat("/proc/thread-self/ns/net").st_ino

    home = here()
    with Lab() as lab:
        with inside(lab.namespace("client")):
            client = here()
            with inside(lab.namespace("server")):
                assert here() not in (home, client)
            assert here() == client
        assert here() == home
        with pytest.raises(RuntimeError), inside(lab.namespace("client")):
            raise RuntimeError
        assert here() == home


@pytest.mark.net
def test_processes_are_those_of_the_hosts_but_never_our_own() -> None:
    with Lab() as lab:
        program = lab.start("client", "sleep", "60")
        names = [lab.namespace("client")]
        lab.wait(lambda: netns.processes(names), "the program in its host")
        with inside(*names):
            assert netns.processes(names) == [program.pid]
        assert netns.processes([lab.namespace("server"), "no-such-namespace"]) == []


@pytest.mark.net
def test_building_and_removing_leaves_no_descriptor_and_no_thread() -> None:
    with Lab():  # the first time loads modules
        pass
    descriptors, threads = os.listdir("/proc/self/fd"), threading.active_count()
    for _ in range(3):
        with Lab(relay_topology(servers=2)):
            pass

    assert len(os.listdir("/proc/self/fd")) == len(descriptors)
    assert threading.active_count() == threads


def netns_names() -> set[str]:
    """The names of all namespaces on this machine."""
    return set(os.listdir(netns.RUN)) if netns.RUN.exists() else set()
