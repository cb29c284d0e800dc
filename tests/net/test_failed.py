"""State `failed` heals by itself: what kept relaying from going on is gone, and it goes on."""

import sys
from typing import Any

import pytest

from krelay.rules.spec import openings
from krelay_vm import Program
from tests.net.world import GPORT, PYTHON, World, greet

pytestmark = pytest.mark.net

SHIM = """#!/bin/sh
[ ! -e {here}/broken ] || {{ echo "Error: nft is broken" >&2; exit 1; }}
exec /usr/sbin/nft "$@"
"""
QUEUE = """
from netfilterqueue import NetfilterQueue as Q
import time
q = Q()
q.bind({number}, print)
print('bound', flush=True)
time.sleep(60)
"""


class Breakable:
    """nft of a krelay's own, which can be broken and repaired."""

    def __init__(self, world: World) -> None:
        self.folder = world.lab.directory / "tools"
        self.folder.mkdir()
        shim = self.folder / "nft"
        shim.write_text(SHIM.format(here=self.folder))
        shim.chmod(0o755)
        self._broken = self.folder / "broken"
        world.serve("server", "tcp/80", "udp/7")

    def break_it(self) -> None:
        self._broken.touch()

    def repair(self) -> None:
        self._broken.unlink()


@pytest.fixture
def tool(world: World) -> Breakable:
    """Made, and not broken."""
    return Breakable(world)


def ready(world: World, tool: Breakable | None = None, *, tcp_relay: bool = True) -> Program:
    """Both daemons, not relaying; krelay has this tool and no other."""
    path = ("env", f"PATH={tool.folder}") if tool else ()
    command = (*PYTHON, "-m", "krelay", "daemon", "--root", str(world.root))
    program = world.lab.start("relay", *path, *command)
    world.until(lambda: program.poll() is not None or world.answers(world.root), "an answer")
    values: dict[str, Any] = {"gport": GPORT, "services": "tcp/80 udp/7", "real_ip": world.server}
    world.put(**values, datapath=world.datapath)
    if tcp_relay:
        world.start_tcp_relay()
    return program


def failed(world: World, reason: str) -> None:
    """Waits until relaying has failed for that reason, and is to be tried again."""
    world.until(lambda: reason in world.read("status/state"), reason)
    assert world.read("status/state").startswith("failed: ")
    assert 0 <= world.values("status")["retry_in"] <= 60


def heals(world: World) -> None:
    """Waits until it relays, without a word of ours."""
    world.until_state("running")
    assert "retry_in" not in world.values("status")
    assert world.who("client", 80).startswith(f"{world.client}:")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")


def served(world: World) -> bool:
    """Whether a client is served by TCP, now."""
    with world.open("client") as sock:
        sock.settimeout(1)
        try:
            sock.connect((world.relay, 80))
            return bool(greet(sock))
        except OSError:
            return False


def occupy(world: World, number: int) -> Program:
    """Another program that serves this queue."""
    other = world.lab.start("relay", sys.executable, "-c", QUEUE.format(number=number))
    world.until(lambda: "bound" in other.output, "a queue")
    return other


def test_rules_that_cannot_be_made_are_made_when_they_can(world: World, tool: Breakable) -> None:
    tool.break_it()
    program = ready(world, tool)
    world.write("start", "1")
    failed(world, "no way to queue packets")
    assert "nft is broken" in world.read("status/state")
    world.until(lambda: world.values("status")["retry_in"] > 2, "a longer pause")
    tool.repair()

    heals(world)
    assert program.output.count("relaying failed") == 1


def test_a_krelay_that_fails_from_its_first_moment_heals(world: World, tool: Breakable) -> None:
    world.root.mkdir()
    for name, text in (("start", "1"), ("real_ip", world.server), ("gport", str(GPORT))):
        world.write(name, text)
    world.write("services", "tcp/80 udp/7")
    world.write("datapath", world.datapath)
    tool.break_it()
    ready(world, tool)
    failed(world, "no way to queue packets")
    tool.repair()

    heals(world)


def test_rules_that_cannot_be_changed_end_relaying_until_they_can(
    world: World, tool: Breakable
) -> None:
    ready(world, tool)
    world.write("start", "1")
    world.until_state("running")
    tool.break_it()
    world.write("services", "tcp/80 udp/7 udp/9")
    failed(world, "rules can't be changed: Error: nft is broken")
    tool.repair()

    heals(world)
    world.krelay("stop")
    assert "table ip krelay" not in world.lab.run("relay", "nft", "list", "tables").stdout


def test_rules_that_somebody_took_out_and_that_cannot_be_put_back_come_back(
    world: World, tool: Breakable
) -> None:
    ready(world, tool)
    world.write("start", "1")
    world.until_state("running")
    tool.break_it()
    world.lab.run("relay", "nft", "flush", "ruleset")
    failed(world, "krelay's rules were taken out, and they can't be put back")
    tool.repair()

    heals(world)


@pytest.mark.parametrize("which", ["packets", "openings"])
def test_a_queue_that_another_program_has_is_taken_when_it_is_free(
    world: World, which: str
) -> None:
    world.serve("server", "tcp/80", "udp/7")
    number = 1600 if which == "packets" else openings(1600)
    other = occupy(world, number)
    before = world.rules()
    ready(world)
    world.write("start", "1")
    failed(world, f"queue {number} is served by another program")
    assert world.rules() == before
    other.terminate()
    other.wait()

    heals(world)


def test_start_tries_at_once_and_stop_ends_the_trying(world: World, tool: Breakable) -> None:
    tool.break_it()
    ready(world, tool)
    world.write("start", "1")
    failed(world, "no way to queue packets")
    world.until(lambda: world.values("status")["retry_in"] > 3, "a longer pause")
    world.write("start", "0")
    world.until_state("stopped")
    assert "retry_in" not in world.values("status")
    world.write("start", "1")
    failed(world, "no way to queue packets")
    tool.repair()
    done = world.krelay("start", "--no-doctor")

    assert (done.status, done.stderr) == (0, "")
    heals(world)


def test_a_host_without_any_address_relays_as_soon_as_it_has_one(world: World) -> None:
    """As at boot, where krelay may be there before the network."""
    world.serve("server", "tcp/80", "udp/7")
    shown = world.lab.run("relay", "ip", "-br", "-4", "addr").stdout.splitlines()
    links = [line.split() for line in shown]
    for name, _, *_ in links:
        world.lab.run("relay", "ip", "-4", "addr", "flush", "dev", name.partition("@")[0])
    ready(world)
    world.write("start", "1")
    world.until_state("running")
    for name, _, *addresses in links:
        for address in addresses:
            link = name.partition("@")[0]
            world.lab.run("relay", "ip", "addr", "add", address, "brd", "+", "dev", link)

    world.until(lambda: served(world), "service")
    heals(world)
