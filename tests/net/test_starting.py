"""What is typed while krelay is only just starting waits for it; blocks of pages can be pasted."""

import os
import re
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from krelay_vm import Program, relay_topology
from tests.net.test_commands import children
from tests.net.world import PYTHON, World

pytestmark = [pytest.mark.net, pytest.mark.one_datapath("it is about processes")]

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
GUIDES = ROOT / "docs" / "guides"
BLOCK = re.compile(r"^( *)```sh\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
TREE = Path("/run/krelay")
PRIVATE = """
mount -t tmpfs tmpfs {spare}
cp -a /etc/. {spare}
mount --bind {spare} /etc
"""
"""A copy of /etc of one's own, in a mount namespace: for useradd."""


def type_in(world: World, script: str) -> Program:
    """A shell of the relay host, with krelay and tcp-relay as commands."""
    names = {"krelay": "krelay", "tcp-relay": "tcp_relay"}
    folder = world.lab.directory / "commands"
    if not folder.exists():  # a shell that runs already may be about to execute one of them
        folder.mkdir()
        for name, module in names.items():
            command = folder / name
            command.write_text(f'#!/bin/sh\nexec {shlex.join(PYTHON)} -m {module} "$@"\n')
            command.chmod(0o755)
    path = f"PATH={folder}:/usr/sbin:/usr/bin:/sbin:/bin"
    return world.lab.start("relay", "env", path, "unshare", "-m", "sh", "-c", script)


def ended(world: World, program: Program) -> str:
    """What a shell has printed when it is done."""
    world.until(lambda: program.poll() is not None, "the end")
    assert program.poll() == 0, program.output
    return program.output


STARTS = "daemon", "up --no-doctor --real-ip 10.77.3.1"
AS_SOON_AS_IT_RUNS = "until readlink /proc/$!/exe | grep -q python; do :; done; "
"""A busy machine takes its time until a shell has executed what it was told to."""


@pytest.mark.parametrize("first", STARTS)
@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("status", "generation"),
        ("status --json", '"generation"'),
        ("get gport", "16000"),
        ("get", "gport=16000"),
        ("nat --json", ""),
        ("counters", "dropped_"),
        ("set timeouts/udp 77 --no-doctor", ""),
        ("flush", "flushed=0"),
        ("doctor --json --real-ip 10.77.3.1", '"ok"'),
    ],
)
def test_commands_wait_for_a_krelay_that_is_being_started(
    world: World, first: str, typed: str, shown: str
) -> None:
    waits_for_its_start(world, first, typed, shown, AS_SOON_AS_IT_RUNS)


@pytest.mark.serial
@pytest.mark.parametrize("first", STARTS)
@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("status", "generation"),
        ("set timeouts/udp 77 --no-doctor", ""),
        ("doctor --json --real-ip 10.77.3.1", '"ok"'),
    ],
)
def test_a_command_waits_that_is_typed_before_krelay_runs(
    world: World, first: str, typed: str, shown: str
) -> None:
    waits_for_its_start(world, first, typed, shown)


def waits_for_its_start(
    world: World, first: str, typed: str, shown: str, between: str = ""
) -> None:
    words = f"--root {world.root}"
    command, _, rest = typed.partition(" ")
    script = f"krelay {first} {words} >&2 & {between}krelay {command} {words} {rest} >out"
    script += "; echo $? >rc"
    program = type_in(world, f"cd {world.lab.directory}; {script}; kill $!; wait")
    world.until(lambda: program.poll() is not None, "the end")

    said = (world.lab.directory / "out").read_text()
    assert (world.lab.directory / "rc").read_text() == "0\n", said + program.output
    assert shown in said
    assert "no krelay serves" not in program.output
    assert f"there is no {world.root}" not in program.output


def test_a_value_that_is_set_meanwhile_is_in_force(world: World) -> None:
    tree = f"--root {world.root}"
    script = (
        f"krelay daemon {tree} & krelay set gport 17000 {tree}; krelay set services udp/7 {tree}; "
        f"krelay get {tree}; kill $!; wait"
    )
    output = ended(world, type_in(world, script))

    assert "gport=17000" in output
    assert "services=udp/7" in output


@pytest.mark.serial
def test_who_asks_where_nobody_starts_is_told_at_once(world: World) -> None:
    begun = time.monotonic()
    done = world.krelay("status", check=False)

    assert done.status == 1
    assert "no krelay serves" in done.stderr
    assert time.monotonic() - begun < 3


@pytest.mark.serial
def test_a_krelay_for_another_tree_is_not_waited_for(world: World) -> None:
    world.start_krelay(tree=world.lab.directory / "other")
    begun = time.monotonic()
    done = world.krelay("status", check=False)

    assert done.status == 1
    assert time.monotonic() - begun < 3


def test_one_that_fails_to_start_is_not_waited_for_for_ever(world: World) -> None:
    tree = f"--root {world.root}"
    script = f"krelay daemon {tree} --queue-num 70000 & krelay status {tree}; echo status=$?"
    output = ended(world, type_in(world, script))

    assert "no krelay serves" in output
    assert output.splitlines()[-1] == "status=1"


# The pages


def steps() -> dict[str, list[str]]:
    """The shell blocks of the guide to a real server, by step."""
    text = (GUIDES / "real-server.md").read_text()
    found: dict[str, list[str]] = {}
    for number, step in re.findall(r"^(\d)\. (.*?)(?=^\d\. |\Z)", text, re.M | re.DOTALL):
        found[number] = [textwrap.dedent(block) for _, block in BLOCK.findall(step)]
    return found


def blocks(page: Path) -> list[str]:
    """All shell blocks of a page."""
    return [textwrap.dedent(block) for _, block in BLOCK.findall(page.read_text())]


@pytest.fixture
def readme() -> Iterator[World]:
    """The network that the pages' addresses are of, with nothing set up yet."""
    with World(relay_topology("10.0.0.0/24", "192.168.0.0/24")) as world:
        assert (world.server, world.relay) == ("192.168.0.1", "192.168.0.2")
        world.serve("server", "tcp/80", "tcp/443", "udp/53")
        world.lab.run("server", "ip", "route", "del", "default")
        world.lab.run("relay", "sysctl", "-qw", "net.ipv4.ip_forward=0")
        world.root = TREE
        to_server, to_forward = steps()["1"]
        world.lab.run("server", "sh", "-c", to_server)
        ended(world, type_in(world, to_forward))
        yield world
        for tree in (TREE, Path("/run/krelay-b")):
            world.lab.run("relay", *PYTHON, "-m", "krelay", "clean", "--root", str(tree))


def works(world: World) -> bool:
    """Whether the client is served and seen, by TCP and UDP."""
    seen = (world.who("client", 80), world.who_udp("client", 53))
    return all(each.startswith(f"{world.client}:") for each in seen)


def interrupt(world: World, program: Program, how: signal.Signals = signal.SIGINT) -> None:
    """Ctrl-C, or another signal, for what a shell runs."""
    world.until(lambda: children(program), "a command")
    for pid in children(program):
        os.kill(pid, how)
    world.until(lambda: program.poll() is not None, "the end")


def test_guide_has_a_block_for_each_step() -> None:
    assert {number: len(found) for number, found in steps().items()} == {
        "1": 2,
        "2": 1,
        "3": 1,
        "4": 0,
        "5": 0,
    }
    assert len(blocks(GUIDES / "firewalls.md")) >= 2
    assert len(blocks(GUIDES / "two-relays.md")) >= 1


@pytest.mark.parametrize("where", ["guide", "README"])
def test_first_try_can_be_pasted(readme: World, where: str) -> None:
    if where == "guide":
        (text,) = steps()["2"]
    else:
        (text,) = [block for block in blocks(README) if "krelay up" in block]
    before = readme.rules()
    program = type_in(readme, f"{text}\n:")
    readme.until(lambda: "Ctrl-C ends it" in program.output, "krelay up")

    assert "failed  " not in program.output
    assert works(readme)
    interrupt(readme, program)
    assert readme.rules() == before
    assert not TREE.exists()


def test_two_daemons_and_firewall_can_be_pasted_in_one_go(readme: World) -> None:
    (daemons,), firewall = steps()["3"], "".join(blocks(GUIDES / "firewalls.md")[:2])
    spare = readme.lab.directory / "etc"
    spare.mkdir()
    python = Path(sys.executable).resolve()
    reachable = "setpriv --reuid=65534 --clear-groups test -x"
    script = f"{PRIVATE.format(spare=spare)}\n{daemons}\n{firewall}\necho pasted; wait"
    if readme.lab.run("relay", *reachable.split(), str(python), check=False).status:
        script = script.replace("tcp-relay --user krelay", "tcp-relay")  # it couldn't read itself
    program = type_in(readme, script)
    readme.until(
        lambda: "pasted" in program.output or program.poll() is not None,
        "all of it",
        timeout=30,  # five programs are started
    )

    assert program.poll() is None, program.output
    assert "No such file" not in program.output
    assert "failed  " not in program.output
    assert "no tcp-relay" not in program.output
    assert readme.read("status/state") == "running"
    assert works(readme)
    shown = readme.lab.run("relay", *PYTHON, "-m", "krelay", "doctor", "--client", readme.client)
    assert "failed" not in shown.stdout
    done = readme.lab.run("relay", *PYTHON, "-m", "krelay", "stop")
    assert done.status == 0
    interrupt(readme, program, signal.SIGTERM)


def test_second_relay_can_be_pasted_beside_the_first(readme: World) -> None:
    (first,) = steps()["2"]
    second = blocks(GUIDES / "two-relays.md")[0]
    programs = [type_in(readme, f"{text}\n:") for text in (first, second)]
    for program in programs:
        readme.until(lambda p=program: "Ctrl-C ends it" in p.output, "krelay up")  # type: ignore[misc]

    assert works(readme)
    for program in programs:
        interrupt(readme, program)
