"""`krelay up` keeps both daemons running, passes options on, and says what is wrong."""

import os
import re
import shlex
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from krelay_vm import Program
from tests.net.test_commands import children, up
from tests.net.test_doctor import sysctl
from tests.net.test_failed import served
from tests.net.world import GPORT, PYTHON, World, greet

pytestmark = pytest.mark.net

DROPS = "table inet {name} {{ chain in {{ type filter hook input priority {at}; policy drop; }}\n}}"


def child(program: Program, name: str) -> int:
    """The pid of `krelay` or `tcp_relay` below `krelay up`; 0: it isn't there."""
    for pid in children(program):
        with suppress(FileNotFoundError, ProcessLookupError):  # it is just ending
            word = b"daemon" if name == "krelay" else name.encode()
            if word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                return pid
    return 0


@pytest.mark.parametrize("name", ["krelay", "tcp_relay"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_who_is_ended_is_started_again(world: World, name: str, how: signal.Signals) -> None:
    world.serve("server", "tcp/80", "udp/7")
    before = world.rules()
    program = up(world)
    assert served(world)
    first = child(program, name)
    os.kill(first, how)

    world.until(lambda: child(program, name) not in (0, first), "another")
    world.until(lambda: served(world), "service")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")
    assert f"{name.replace('_', '-')} " in program.output
    assert "again_in=0.0" in program.output
    program.signal(signal.SIGINT)
    assert program.wait() == 130
    assert world.rules() == before
    assert not world.root.exists()


def test_connections_outlive_a_killed_krelay_and_nothing_passes_meanwhile(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    program = up(world)
    kept = world.connect("client", 80)
    greet(kept)
    first = child(program, "krelay")
    os.kill(first, signal.SIGKILL)
    world.until(lambda: not Path(f"/proc/{first}").exists(), "its end")
    assert "table ip krelay" in world.lab.run("relay", "nft", "list", "tables").stdout

    world.until(lambda: child(program, "krelay") not in (0, first), "another")
    world.until(lambda: served(world), "service")
    kept.sendall(b"still there")
    assert kept.recv(100) == b"still there"


@pytest.mark.one_datapath("it doesn't come to relaying")
def test_who_never_stays_up_ends_the_whole_and_leaves_no_rules(world: World) -> None:
    world.serve("server", "tcp/80")
    before = world.rules()
    program = up(world)
    killed = set()
    while program.poll() is None:
        if (pid := child(program, "krelay")) and pid not in killed:
            os.kill(pid, signal.SIGKILL)
            killed.add(pid)
        time.sleep(0.01)

    assert program.wait() == 1
    last = program.output.splitlines()[-1]
    assert last == ("krelay up: krelay was ended by SIGKILL 10 times in a row; its log says why")
    assert re.findall(r"again_in=([0-9.]+)", program.output) == [
        *("0.0", "0.1", "0.2", "0.4", "0.8", "1.6", "3.2", "5.0", "5.0")
    ]
    assert len(killed) == 10
    assert world.rules() == before
    assert not world.root.exists()


@pytest.mark.one_datapath("it is about processes")
def test_options_of_tcp_relay_are_passed_on(world: World) -> None:
    world.serve("server", "tcp/80")
    options = ("--workers", "2", "--half-close", "60", "--buffer", "64K", "--no-seccomp")
    program = up(world, *options, "--stall", "10", "--dscp", "none")
    command = Path(f"/proc/{child(program, 'tcp_relay')}/cmdline").read_text().split("\0")

    assert "--no-seccomp" in command
    for option, value in (
        ("--workers", "2"),
        ("--half-close", "60.0"),
        ("--buffer", "65536"),
        ("--stall", "10.0"),
        ("--dscp", "none"),
    ):
        assert command[command.index(option) + 1] == value
    assert "--connect-timeout" not in command
    assert world.values("status")["tcp_relays"] == 2
    assert served(world)


@pytest.mark.one_datapath("what it finds is the host's")
def test_up_says_warnings_and_every_chain_that_drops(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    world.nft("relay", DROPS.format(name="one", at=0) + "\n" + DROPS.format(name="two", at=10))
    world.lab.run("relay", "ethtool", "-K", "eth0", "rx-udp-gro-forwarding", "on")
    program = up(world)
    told = program.output.splitlines()

    for table in ("one", "two"):
        assert any(
            line.startswith("failed  firewall  ") and f"inet {table} in (T1" in line
            for line in told
        ), table
    assert any(line.startswith("warning  UDP GRO  ") for line in told)
    assert world.read("status/state") == "running"


@pytest.mark.one_datapath("what it finds is the host's")
def test_up_that_is_not_to_look_says_nothing(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    sysctl(world, "net.ipv4.ip_forward=0")
    program = up(world, "--no-doctor")

    assert "failed  " not in program.output


@pytest.mark.one_datapath("what it finds is the host's")
def test_start_and_set_say_what_is_wrong_and_change_no_exit_status(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    world.start_krelay()
    world.put(gport=GPORT, services="tcp/80 udp/7", real_ip=world.server)
    world.nft("relay", DROPS.format(name="one", at=0) + "\n" + DROPS.format(name="two", at=10))
    done = world.krelay("start")
    assert (done.status, done.stdout) == (0, "")
    lines = done.stderr.splitlines()
    assert [line for line in lines if line.startswith("warning  krelay  no tcp-relay")]
    assert len([line for line in lines if "(T1, input)" in line]) == 2

    world.start_tcp_relay()
    done = world.krelay("set", "gport", "17000")
    assert (done.status, done.stdout) == (0, "")
    assert len([line for line in done.stderr.splitlines() if "port 17000 is dropped" in line]) == 2
    assert "no tcp-relay" not in done.stderr
    done = world.krelay("set", "gport", "17001", "--no-doctor")
    assert (done.status, done.stderr) == (0, "")


@pytest.mark.one_datapath("it is about processes")
def test_a_tcp_relay_that_is_only_just_being_started_is_not_missed(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    world.start_krelay()
    world.put(gport=GPORT, services="tcp/80 udp/7", real_ip=world.server)
    krelay, relay = (shlex.join((*PYTHON, "-m", name)) for name in ("krelay", "tcp_relay"))
    script = f"{relay} --root {world.root} & {krelay} start --root {world.root}; kill $!"
    done = world.lab.run("relay", "sh", "-c", script, timeout=20)

    assert "no tcp-relay" not in done.stderr
