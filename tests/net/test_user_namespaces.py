"""No root outside: a user namespace whose root has a network of his own (rootless containers).

The relay host's links are moved into such a network; everything of krelay's runs in it.
"""

import contextlib
import json
import socket
import sys
from collections.abc import Iterator

import pytest

from krelay_vm import Program
from tests.net.world import GPORT, PYTHON, World

pytestmark = pytest.mark.net

SERVICES = "tcp/80 tcp/443=forward udp/7 udp/53"
ALONE, MANY = "0 0 1", "0 0 65536"
NET_BIND_SERVICE = 10
"""linux/capability.h"""
NO_OFFLOAD = """
import runpy, sys
from krelay.offload import carrier
class Refused:
    def __init__(self, *_, **__):
        raise PermissionError(1, "Operation not permitted")
carrier.TcBackend = Refused
sys.argv = ["krelay", *sys.argv[1:]]
runpy.run_module("krelay", run_name="__main__")
"""


class Confined:
    """The relay host as a user namespace has it."""

    def __init__(self, world: World, ids: str) -> None:
        self.world = world
        holder = world.lab.start(
            "relay", "unshare", "--user", "--net", "--mount", "--fork", "--kill-child",
            "sh", "-c", "echo up; exec sleep 600",
        )  # fmt: skip
        world.until(lambda: "up" in holder.output, "a user namespace")
        (child,) = world.lab.run("relay", "pgrep", "-P", str(holder.pid)).stdout.split()
        self._inside = ("nsenter", "-t", child, "-U", "-n", "-m")
        for kind in ("uid_map", "gid_map"):
            world.lab.run("relay", "sh", "-c", f"echo {ids} > /proc/{child}/{kind}")
        for number, towards in enumerate(("client", "server")):
            interface = world.lab.topology.interface("relay", towards)
            world.lab.run("relay", "ip", "link", "set", f"eth{number}", "netns", child)
            for words in (f"addr add {interface.addresses[0]} dev eth{number}",
                          f"link set eth{number} up"):  # fmt: skip
                self.run("ip", *words.split())
        self.run("ip", "link", "set", "lo", "up")
        self.run("sysctl", "-qw", "net.ipv4.ip_forward=1")

    def run(self, *argv: str) -> str:
        """What a command prints there."""
        return self.world.lab.run("relay", *self._inside, *argv).stdout

    def start(self, *argv: str) -> Program:
        """A program there."""
        return self.world.lab.start("relay", *self._inside, *argv)

    def up(self) -> Program:
        """`krelay up`, once it relays."""
        world = self.world
        program = self.start(
            *PYTHON, "-m", "krelay", "up", "--root", str(world.root), "--gport", str(GPORT),
            "--real-ip", world.server, "--services", SERVICES, "--datapath", world.datapath,
        )  # fmt: skip
        world.until(lambda: "Ctrl-C ends it" in program.output or program.poll() is not None, "up")
        assert program.poll() is None, program.output
        return program


@contextlib.contextmanager
def confined(datapath: str, ids: str) -> Iterator[Confined]:
    with World(datapath=datapath) as world:
        world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
        yield Confined(world, ids)


def relays(world: World) -> None:
    """All kinds of services, and the client is seen."""
    for _ in range(2):
        for port in (80, 443):
            assert world.who("client", port).startswith(f"{world.client}:")
        for port in (7, 53):
            assert world.who_udp("client", port).startswith(f"{world.client}:")


def capabilities(here: Confined) -> set[int]:
    """What tcp-relay may do in its own user namespace."""
    (pid,) = here.world.lab.run("relay", "pgrep", "-f", f"tcp_relay --root {here.world.root}"
                                ).stdout.split()  # fmt: skip
    status = here.world.run("relay", "cat", f"/proc/{pid}/status")
    (held,) = (int(line.split()[1], 16) for line in status.splitlines() if "CapEff" in line)
    return {cap for cap in range(64) if held >> cap & 1}


@pytest.mark.parametrize("ids", [ALONE, MANY], ids=["one user id", "many"])
def test_the_root_of_a_user_namespace_can_relay(datapath: str, ids: str) -> None:
    with confined(datapath, ids) as here:
        up = here.up()
        relays(here.world)
        said = here.world.values("status")["datapath"]  # BPF is the host's root's
        assert said.startswith("queue" if datapath == "queue" else "queue (the kernel runs no")
        words = "this user namespace has no other" if ids == ALONE else "which is nobody else's"
        assert words in up.output
        assert "Warning" not in up.output
        assert capabilities(here) <= {NET_BIND_SERVICE}
        doctor = (*PYTHON, "-m", "krelay", "doctor", "--json", "--root", str(here.world.root))
        found = [json.loads(line) for line in here.run(*doctor).splitlines()]
        levels = {each["check"]: each["level"] for each in found}
        wrong = [pair for pair in levels.items() if pair[1] in ("warning", "failed")]
        enough = int(here.run("cat", "/proc/sys/net/core/rmem_max")) >= 8 << 20
        expected = ["buffer"] * (not enough) + ["datapath"] * (datapath == "auto")
        assert sorted(wrong) == [(check, "warning") for check in expected]
        up.terminate()
        assert up.wait() == 130
        assert "krelay" not in here.run("nft", "list", "ruleset")


def test_both_daemons_run_apart_in_a_user_namespace(datapath: str) -> None:
    with confined(datapath, ALONE) as here:
        world, root = here.world, ("--root", str(here.world.root))
        here.start(*PYTHON, "-m", "krelay", "daemon", *root)
        world.until(lambda: world.answers(world.root), "an answer")
        here.start(*PYTHON, "-m", "tcp_relay", *root)
        world.put(datapath=datapath, services=SERVICES, gport=GPORT, real_ip=world.server, start=1)
        world.until(lambda: "gateway_port=served" in world.ask("show status"), "served")
        relays(world)


def test_flows_in_a_user_namespace_come_and_go_by_hundreds(datapath: str) -> None:
    """The kernel grants its sockets less room than krelay asks for."""
    with confined(datapath, ALONE) as here:
        up = here.up()
        world = here.world
        socks = [world.open("client", socket.SOCK_DGRAM) for _ in range(400)]
        for _ in range(3):
            for sock in socks:
                assert world.exchange(sock, b"who", (world.relay, 7))
        flows = world.complete(lambda: world.flows("proto=udp"))
        assert [flow["packets"] for flow in flows if flow["service"].endswith(":7")] == [
            [3, 3]
        ] * 400
        assert "as krelay left it" not in up.output


@pytest.mark.one_datapath("a kernel without offload has one")
def test_where_the_kernel_offloads_nothing_every_packet_visits_krelay(world: World) -> None:
    reason = "the kernel runs no programs of krelay's: Operation not permitted"
    world.serve("server", "tcp/80", "tcp/443", "udp/7", "udp/53")
    daemon = world.lab.start(
        "relay",
        *(sys.executable, "-B", "-c", NO_OFFLOAD),
        *("daemon", "--root", str(world.root)),
    )
    world.until(lambda: world.answers(world.root), "an answer")
    world.put(services=SERVICES, gport=GPORT, real_ip=world.server)
    world.start_tcp_relay()
    world.put(start=1)
    world.until_state("running")
    relays(world)
    assert world.values("status")["datapath"] == f"queue ({reason})"
    assert daemon.output.count("every packet visits krelay") == 1
    assert reason in world.krelay("doctor").stdout
    world.put(real_ip=world.lab.address("server2"))  # rules are changed as before
    world.put(real_ip=world.server)
    relays(world)
