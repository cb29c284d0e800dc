"""krelay as a user who has CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF, or the first two alone."""

import os

import pytest

from krelay_vm import Program, Result
from tests.net.world import GPORT, PYTHON, World

pytestmark = pytest.mark.net

USER = 12345
BOTH = ("net_admin", "net_raw")
ALL = (*BOTH, "bpf")


def as_user(*capabilities: str) -> tuple[str, ...]:
    """The words before a command that make it one of this user's, with these capabilities."""
    given = ",".join(["-all", *(f"+{each}" for each in capabilities)])
    return (
        *("setpriv", f"--reuid={USER}", f"--regid={USER}", "--clear-groups"),
        *(f"--inh-caps={given}", f"--ambient-caps={given}", f"--bounding-set={given}"),
    )


@pytest.fixture
def tree(world: World) -> World:
    """A file tree of that user's."""
    world.root.mkdir()
    os.chown(world.root, USER, USER)
    return world


def start(world: World, *capabilities: str) -> Program:
    """`krelay daemon`."""
    command = (*PYTHON, "-m", "krelay", "daemon", "--root", str(world.root))
    return world.lab.start("relay", *as_user(*capabilities), *command)


def run(world: World, capabilities: tuple[str, ...], *words: str) -> Result:
    """A command of that user's."""
    command = (*PYTHON, "-m", "krelay", words[0], "--root", str(world.root), *words[1:])
    return world.lab.run("relay", *as_user(*capabilities), *command, check=False, timeout=20)


def relay(world: World, capabilities: tuple[str, ...] = ALL) -> Program:
    """Both daemons, relaying."""
    program = start(world, *capabilities)
    world.until(lambda: program.poll() is not None or world.answers(world.root), "an answer")
    assert program.poll() is None, program.output
    world.put(gport=GPORT, services="tcp/80 udp/7", real_ip=world.server, datapath=world.datapath)
    command = (*PYTHON, "-m", "tcp_relay", "--root", str(world.root))
    world.lab.start("relay", *as_user(), *command)
    world.until(lambda: world.values("status")["gateway_port"] == "served", "served")
    done = run(world, BOTH, "start", "--no-doctor")
    assert (done.status, done.stderr) == (0, "")
    return program


@pytest.mark.parametrize("held", [BOTH, ALL], ids=["two", "three"])
def test_two_capabilities_are_enough_to_relay_and_three_to_offload(
    tree: World, held: tuple[str, ...]
) -> None:
    tree.serve("server", "tcp/80", "udp/7")
    before = tree.rules()
    program = relay(tree, held)

    assert tree.who("client", 80).startswith(f"{tree.client}:")
    for _ in range(6):
        assert tree.who_udp("client", 7).startswith(f"{tree.client}:")
    assert tree.in_kernel == (tree.datapath == "auto" and held == ALL)
    assert "isn't shown to this user" in program.output
    assert "Traceback" not in program.output
    assert run(tree, BOTH, "stop").status == 0
    assert tree.rules() == before


def test_settings_may_change_and_a_killed_one_is_followed_by_another(tree: World) -> None:
    tree.serve("server", "tcp/80", "udp/7")
    tree.serve("server2", "tcp/80", "udp/7")
    program = relay(tree)
    done = run(tree, BOTH, "set", "real_ip", tree.lab.address("server2"), "--no-doctor")
    assert (done.status, done.stderr) == (0, "")
    assert tree.who("client", 80).startswith(f"{tree.client}:")
    tree.kill(program)
    again = start(tree, *ALL)
    tree.until(lambda: again.poll() is not None or tree.answers(tree.root), "an answer")
    tree.until_state("running")

    assert 'after="a killed krelay"' in again.output
    tree.until(lambda: tree.values("status")["gateway_port"] == "served", "served again")
    assert tree.who("client", 80).startswith(f"{tree.client}:")
    assert tree.who_udp("client", 7).startswith(f"{tree.client}:")


@pytest.mark.parametrize(
    ("held", "wanting"),
    [
        (("net_admin",), "CAP_NET_RAW is wanting"),
        (("net_raw",), "CAP_NET_ADMIN is wanting"),
        ((), "CAP_NET_ADMIN and CAP_NET_RAW are wanting"),
    ],
)
@pytest.mark.one_datapath("it doesn't come to relaying")
def test_without_one_of_the_two_it_names_it(
    tree: World, held: tuple[str, ...], wanting: str
) -> None:
    program = start(tree, *held)

    assert program.wait(30) == 1
    (line,) = program.output.splitlines()
    assert line.startswith("krelay daemon: needs root, or CAP_NET_ADMIN and CAP_NET_RAW")
    assert wanting in line


@pytest.mark.one_datapath("what it finds is the host's")
def test_doctor_says_what_such_a_user_is_not_shown(tree: World) -> None:
    relay(tree)
    shown = run(tree, BOTH, "doctor").stdout.splitlines()
    by_check = {line[9:].lstrip().partition("  ")[0]: line for line in shown}

    assert by_check["queue"].startswith("not tried  queue ")
    assert "shown to root and its group alone" in by_check["queue"]
    assert by_check["privileges"].startswith("ok       privileges    user 12345")
    assert by_check["gateway port"].startswith("ok ")
    assert by_check["rules"].startswith("ok ")


@pytest.mark.one_datapath("what it finds is the host's")
def test_doctor_without_privileges_claims_nothing_of_what_it_cannot_see(tree: World) -> None:
    relay(tree)
    shown = run(tree, (), "doctor").stdout.splitlines()
    told = {line[9:].lstrip().partition("  ")[0]: line[:9].strip() for line in shown}

    for check in ("queue", "rules", "datapath", "firewall", "leftovers"):
        assert told[check] == "not tried", check
    assert told["privileges"] == "failed"
    assert told["forwarding"] == "ok"
