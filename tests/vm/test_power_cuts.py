"""Machines that are cut off, and killed, in the middle of everything.

With KRELAY_LONG=1 the stall limit is the one that tcp-relay has by itself.
"""

import os
import re
import time

import pytest

from krelay_vm import Program
from tests.net.world import World
from tests.vm.crossing import TOPOLOGY, files, serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LONG = bool(os.environ.get("KRELAY_LONG"))
STALL = 25.0 if LONG else 6.0
"""Seconds of silence after which tcp-relay takes a peer for lost."""
SLACK = 5.0
ENOUGH = 1_000_000
"""Bytes after which a transfer is in its middle."""
ENDLESS = 1 << 32
RESET = (55, 56)
"""curl's exit status when it was reset while it sent, or received."""


def moved(world: World) -> int:
    """Bytes of the connection that has moved most, in both directions."""
    flows = world.flows("proto=tcp state=established")
    return max((sum(flow["bytes"]) for flow in flows), default=0)


def established(world: World, host: str) -> list[str]:
    """The TCP connections that a host believes to have."""
    return world.run(host, "ss", "-tnH", "state", "established").splitlines()


def transfer(world: World, *words: str) -> Program:
    """curl on the client, once it is in the middle of a transfer."""
    curl = world.lab.start("client", "sh", "-c", " ".join(words))
    world.until(lambda: moved(world) > ENOUGH, "the middle of a transfer")
    return curl


def told(world: World, curl: Program) -> None:
    """The client is told by a reset, within the stall limit; and the flow ends."""
    began = time.monotonic()
    status = curl.wait(STALL + SLACK)
    assert status in RESET, curl.output
    assert time.monotonic() - began > STALL / 4  # and not by the cable itself
    world.until(lambda: not world.flows("proto=tcp state=established"), "the row to end")


@pytest.mark.vm
def test_a_server_that_is_cut_off_and_killed_is_replaced_by_another() -> None:
    with World(TOPOLOGY, backends="uml") as world:
        serve(world, ENOUGH)
        with (files(world, "server") / "endless").open("wb") as file:
            file.truncate(ENDLESS)
        world.begin(services="tcp/80 udp/53")
        if not LONG:
            world.put(timeouts__stall=int(STALL))
        to = f"http://{world.relay}/files"

        upload = transfer(world, f"head -c {ENDLESS} /dev/zero | curl -sS -T - {to}/endless-too")
        world.lab.link_down("server")
        told(world, upload)
        world.lab.link_up("server")

        download = transfer(world, f"curl -sS -o /dev/null {to}/endless")
        world.lab.link_down("server")
        world.lab.kill("server")
        told(world, download)

        world.put(real_ip=world.lab.address("server2"))
        assert world.run("client", "curl", "-sS", "-m20", f"{to}/whose") == "server2\n"
        assert "Traceback" not in world.krelay_process.output + world.tcp_relay_process.output


@pytest.mark.parametrize(
    "relay",
    [
        pytest.param("uml", marks=pytest.mark.vm),
        pytest.param("qemu", marks=pytest.mark.qemu),
    ],
)
def test_a_relay_that_lost_its_power_and_is_back_serves_again(relay: str) -> None:
    with World(TOPOLOGY, backends={"relay": relay}) as world:
        serve(world, ENOUGH)
        with (files(world, "server") / "endless").open("wb") as file:
            file.truncate(ENDLESS)
        world.begin(services="tcp/80 udp/53")
        to = f"http://{world.relay}/files"
        # Whoever only waits must ask now and then whether the other side still knows.
        download = transfer(world, f"curl -sS --keepalive-time 2 -o /dev/null {to}/endless")
        assert established(world, "client")
        assert established(world, "server")

        world.lab.kill("relay")
        world.lab.boot("relay")
        assert world.run("relay", "ls", "/run").split() == []
        world.begin(services="tcp/80 udp/53")

        assert world.run("client", "curl", "-sS", "-m20", f"{to}/whose") == "server\n"
        assert download.wait(world.patience) in RESET, download.output
        for host in ("client", "server"):
            world.until(lambda host=host: not established(world, host), f"{host} to forget", 60.0)  # type: ignore[misc]
        assert [flow["state"] for flow in world.flows("proto=tcp")] == ["closed"]
        assert not re.findall(r"Traceback|error", world.krelay_process.output)
