"""What routers have and a kernel for machines of one purpose may lack: flow tables and VRFs.

Debian's kernel in QEMU has both as modules.  In each set-up relaying breaks, the doctor names the
cause, and its fix, typed as it is printed, has clients served again.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from krelay_vm import kernels
from tests.net.world import PYTHON, World

pytestmark = [pytest.mark.qemu, pytest.mark.slow]

FLOWTABLE = """
table inet router {
  flowtable ft { hook ingress priority 0; devices = { eth0, eth1 }; }
  chain forward {
    type filter hook forward priority 0; policy accept;
    meta l4proto { tcp, udp } flow add @ft
    ct state established,related accept
  }
}
"""
MODULES = ("nft_flow_offload", "nf_flow_table", "nf_flow_table_inet", "vrf", "nft_ct")
ASK = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.settimeout(2)
for _ in range(4):
    try:
        sock.sendto(b"who", (sys.argv[1], 7))
        print(sock.recvfrom(100)[1][0])
    except OSError:
        print("nothing")
"""
FORWARDED = """
import socket, sys
with socket.create_connection((sys.argv[1], 443), 5) as sock:
    sock.settimeout(4)
    try:
        for _ in range(4):
            sock.sendall(b"who\\n" if not _ else b"x")
            print("answered" if sock.recv(100) else "ended")
    except OSError:
        print("nothing")
"""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A relay on an emulated PC, with these modules loaded."""
    with World(backends={"relay": "qemu"}) as world:
        world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
        world.begin(services="tcp/80 tcp/443=forward udp/7 udp/53")
        files = kernels.module_files(kernels.kernel("qemu"), MODULES)
        insert = "for file; do busybox insmod $file 2>/dev/null; done; true"
        world.lab.run("relay", "sh", "-c", insert, "sh", *files, timeout=world.patience)
        yield world


def sources(world: World, program: str = ASK) -> list[str]:
    """From which address each of some answers comes to one socket of a client's."""
    argv = (sys.executable, "-B", "-c", program, world.relay)
    return world.lab.run("client", *argv, timeout=world.patience).stdout.split()


def doctor(world: World, check: str) -> list[dict[str, Any]]:
    """The findings of one check."""
    argv = (*PYTHON, "-m", "krelay", "doctor", "--json", "--client", world.client)
    done = world.lab.run("relay", *argv, "--root", str(world.root), check=False,
                         timeout=world.patience)  # fmt: skip
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return [each for each in found if each["check"] == check]


def type_as_root(world: World, command: str) -> None:
    world.lab.run("relay", "sh", "-c", command, timeout=world.patience)


def test_a_flow_table_takes_answers_past_krelay_and_the_doctor_names_it(world: World) -> None:
    assert sources(world) == [world.relay] * 4
    world.lab.run("relay", "nft", "-f", "-", input=FLOWTABLE, timeout=world.patience)
    assert sources(world)[1:] == [world.server] * 3
    told = [each for each in doctor(world, "firewall") if each["level"] == "failed"]
    assert told
    assert all("flow add @ft" in each["text"] for each in told), told
    assert all("handed to a flow table" in each["text"] for each in told), told
    for each in told:
        type_as_root(world, each["fix"])

    assert [each["level"] for each in doctor(world, "firewall")] == ["ok"]
    assert sources(world) == [world.relay] * 4
    assert sources(world, FORWARDED) == ["answered"] * 4
    world.lab.run("relay", "nft", "delete", "table", "inet", "router", timeout=world.patience)


@pytest.mark.parametrize("inside", [("eth0",), ("eth0", "eth1")])
def test_links_in_a_vrf_are_not_relayed_and_the_doctor_names_them(
    world: World, inside: tuple[str, ...]
) -> None:
    type_as_root(world, "ip link show red || ip link add red type vrf table 10; ip link set red up")
    assert [each["level"] for each in doctor(world, "VRF")] == ["ok"]
    assert sources(world) == [world.relay] * 4  # one that has no link of ours
    for link in inside:
        type_as_root(world, f"ip link set {link} master red")
    assert sources(world) == ["nothing"] * 4
    (told,) = doctor(world, "VRF")
    assert told["level"] == "failed"
    assert all(f"{link} in red" in told["text"] for link in inside)
    type_as_root(world, told["fix"])

    assert [each["level"] for each in doctor(world, "VRF")] == ["ok"]
    assert sources(world) == [world.relay] * 4
