"""Relay ports are used again and again, soundly: no user sees that a port was taken.

One client opens connection after connection to one service (programs/churn.py).  What it does not
get, or gets of another's, is an error; how a connection ends decides where its ports then stand in
TIME_WAIT: at the client, at the relay, or on the server.  The client host may use ports again at
once, and more of them than is usual, so that not it is the first to run out.

A port in TIME_WAIT is bound by its number, and may then connect to the same server again at once if
timestamps tell the old connection's segments from the new one's (RFC 6191); net.ipv4.tcp_tw_reuse
is about ports that the kernel chooses, and changes nothing here.  Without timestamps a port waits
for its minute, and a relay can open no more connections than it has ports for that long.

The relay host has few ports here, so that within seconds they are used again.  KRELAY_LONG=1
is as fast and as long as it is meant to hold, with all of them.
"""

import json
import os
import re
from typing import Any

import pytest

from tests.net.programs import churn
from tests.net.world import PYTHON, World

pytestmark = [pytest.mark.net, pytest.mark.slow]

LONG = bool(os.environ.get("KRELAY_LONG"))
AT_FULL_RATE = [pytest.mark.serial] * LONG
"""So many connections a second are more than a machine makes that does something else."""
RATE, SECONDS = (1500, 180) if LONG else (100, 4)
PORTS = 28_232 if LONG else 250
FEW = 200 if LONG else 40
FIRST_PORT = 32_768
PORT = 80


def churning(world: World, way: str, *, rate: int, seconds: float) -> dict[str, Any]:
    """What the client has met, when all is over."""
    drive = (*PYTHON, churn.__file__, "drive", world.relay, str(PORT))
    done = world.lab.run(
        "client", *drive, str(rate), str(seconds), way, timeout=2 * seconds + 3 * churn.PATIENCE
    )
    figures: dict[str, Any] = json.loads(done.stdout)
    print(f"\n    {way} ends first, {rate}/s for {seconds:g} s: {figures}", end="")
    for line, count in complaints(world).items():
        print(f"\n    {count} x {line}", end="")
    return figures


def complaints(world: World) -> dict[str, int]:
    """Log lines of krelay and tcp-relay that are more than news, or tell of a refusal."""
    found: dict[str, int] = {}
    for program in (world.krelay_process, world.tcp_relay_process):
        for line in program.output.splitlines():
            if re.search(r"warning|error|refused|taken|EADDR|connect_failed|killed", line, re.I):
                # The time and whatever differs from one connection to the next
                kind = re.sub(r"^\S+ |\d+\.\d+\.\d+\.\d+:\d+|\d+", "#", line)
                found[kind] = found.get(kind, 0) + 1
    return found


def begin(world: World, ports: int, timestamps: int = 1) -> None:
    """Server, relay with so many ports, and the settings of all hosts."""
    few = f"{FIRST_PORT} {FIRST_PORT + ports - 1}"
    for host, settings in {
        "client": ("net.ipv4.ip_local_port_range=1024 65535", "net.ipv4.tcp_tw_reuse=1"),
        "relay": (f"net.ipv4.ip_local_port_range={few}",),
        "server": (f"net.ipv4.tcp_timestamps={timestamps}",),
    }.items():
        world.lab.run(host, "sysctl", "-qw", *settings)
    world.lab.start("server", *PYTHON, churn.__file__, "serve", "0.0.0.0", str(PORT))
    world.lab.wait_listening("server", "tcp", PORT)
    world.begin(services=f"tcp/{PORT}")


@pytest.mark.timeout(3 * SECONDS + 120)
@pytest.mark.parametrize("way", [pytest.param(way, marks=AT_FULL_RATE) for way in churn.WAYS])
def test_a_relay_port_is_used_again_before_its_time_wait_is_over(world: World, way: str) -> None:
    begin(world, PORTS)
    figures = churning(world, way, rate=RATE, seconds=SECONDS)
    assert figures["errors"] == {}
    assert figures["done"] == RATE * SECONDS


def test_without_timestamps_who_finds_no_port_is_reset_and_the_log_says_why(world: World) -> None:
    begin(world, FEW, timestamps=0)
    figures = churning(world, churn.CLIENT, rate=FEW * 3 // 4, seconds=2)
    assert figures["done"] == FEW
    assert figures["errors"] == {"open: ECONNRESET": FEW // 2}
    assert "no local port is free" in world.tcp_relay_process.output
    assert "no local port was free" in world.tcp_relay_process.output


def test_ports_that_the_host_has_reserved_are_never_taken(world: World) -> None:
    """By none of the two: TCP and UDP each, with the address that the relay has."""
    settings = {"port_range": "32768 32775", "reserved_ports": "32768-32770,32772-32774,40000"}
    for name, value in settings.items():
        world.lab.run("relay", "sysctl", "-qw", f"net.ipv4.ip_local_{name}={value}")
    world.serve("server", "tcp/80", "udp/7")
    world.begin(source="relay")
    own = world.lab.address("relay", towards="server")
    seen = [world.who("client", 80) for _ in range(2)]
    assert sorted(seen) == [f"{own}:32771", f"{own}:32775"]

    assert world.who_udp("client", 7, bind=40001) == f"{own}:40001"
    host, _, port = world.who_udp("client", 7, bind=40000).rpartition(":")
    assert (host, int(port) % 2) == (own, 0)
    assert int(port) not in {32768, 32769, 32770, 32772, 32773, 32774, 40000}
