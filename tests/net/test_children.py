"""`krelay up` and other commands, typed by root in a bad place: whose code runs, and as whom."""

import os
import shlex
import signal
from pathlib import Path

import pytest

from knet.privileges import DYNAMIC
from krelay_vm import Program
from tests.net.world import PYTHON, World

pytestmark = [
    pytest.mark.net,
    pytest.mark.one_datapath("who runs is settled before packets are"),
]

KRELAY = (*PYTHON, "-P", "-m", "krelay")
"""As the installed command: without the caller's folder."""
MODULES = (
    "tcp_relay",
    "procfs_sim",
    "krelay_vm",
    "rich",
    "pyroute2",
    "netfilterqueue",
    "inotify_simple",
)
BEFORE_US = ("krelay", "sitecustomize", "usercustomize", "subprocess", "json", "runpy")
"""Modules that Python loads from PYTHONPATH before a line of ours is read."""
TOOLS = ("nft", "iptables", "iptables-save", "iptables-restore", "ip", "sysctl", "sh", "nsenter")


@pytest.fixture
def trap(world: World) -> Path:
    """A folder of user nobody's, with modules and programs that tell when they are run."""
    folder = world.lab.directory / "trap"
    folder.mkdir()
    sprung = folder / "sprung"
    for name in (*MODULES, *BEFORE_US):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"open({str(sprung)!r}, 'a').write({name!r})\n")
    for name in TOOLS:
        (folder / name).write_text(f"#!/bin/sh\necho {name} >>{sprung}\nexit 1\n")
        (folder / name).chmod(0o755)
    os.chown(folder, 65534, 65534)
    folder.chmod(0o1777)
    return folder


def with_python_path(trap: Path) -> str:
    """What a shell does so that Python looks into the folder, for all that is up to us."""
    gone = " ".join(BEFORE_US)
    return f"cd {trap}; rm -r {gone}; export PYTHONPATH=:/nowhere"


def up(world: World, *options: str, lead: str = "", tree: str = "run") -> Program:
    """`krelay up`, until it says that it relays; `lead` is what the shell does first."""
    given = ("--root", str(world.lab.directory / tree), "--real-ip", world.server)
    values = (*given, "--services", "tcp/80", *options)
    words = shlex.join((*KRELAY, "up", *values))
    program = world.lab.start("relay", "sh", "-c", f"{lead or 'true'}; exec {words}")
    world.until(lambda: "Ctrl-C ends it" in program.output or program.poll() is not None, "up")
    assert program.poll() is None, program.output
    return program


def child(program: Program, module: str) -> int:
    """The pid of that child."""
    pids = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    (found,) = (
        int(pid)
        for pid in pids
        if module in Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:7]
    )
    return found


def status(pid: int) -> dict[str, list[str]]:
    """/proc/PID/status."""
    lines = (line.partition(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: text.split() for name, _, text in lines}


LEADS = {
    "the folder": "cd {trap}",
    "PYTHONPATH": "cd {trap}; export PYTHONPATH=",
    "PATH": "cd {trap}; PATH=.:$PATH",
    "an empty entry of PATH": "cd {trap}; PATH=:$PATH",
    "a PATH of nobody's": "PATH={trap}:$PATH",
    "the linker": "cd {trap}; export LD_LIBRARY_PATH=:/nowhere XTABLES_LIBDIR=. BASH_ENV=./sh",
}


@pytest.mark.parametrize("lead", ["an empty entry of PYTHONPATH", *LEADS])
def test_up_runs_nothing_of_the_folder_it_is_typed_in(world: World, trap: Path, lead: str) -> None:
    world.serve("server", "tcp/80")
    shell = LEADS[lead].format(trap=trap) if lead in LEADS else with_python_path(trap)
    program = up(world, lead=shell)
    assert world.who("client", 80).startswith(f"{world.client}:")
    program.signal(signal.SIGINT)

    assert program.wait() == 130
    assert not (trap / "sprung").exists(), (trap / "sprung").read_text()


@pytest.mark.parametrize("words", ["daemon", "doctor --fix", "clean", "status"])
def test_other_commands_neither(world: World, trap: Path, words: str) -> None:
    command, *rest = words.split()
    argv = shlex.join((*KRELAY, command, "--root", str(world.root), *rest))
    lead = f"{with_python_path(trap)} PATH=.:$PATH"
    program = world.lab.start("relay", "sh", "-c", f"{lead}; exec {argv}")
    if command == "daemon":
        world.until(lambda: world.answers(world.root), "krelay")
        world.write("start", "1")
        world.until(lambda: world.read("status/state") != "stopped", "a start")
        program.signal(signal.SIGTERM)
    program.wait()

    assert not (trap / "sprung").exists(), (trap / "sprung").read_text()
    assert "Traceback" not in program.output


@pytest.mark.slow
def test_demo_neither(world: World, trap: Path) -> None:
    lead = f"{with_python_path(trap)} PATH=.:$PATH"
    argv = shlex.join((*KRELAY, "demo"))
    done = world.lab.run("relay", "sh", "-c", f"{lead}; exec {argv}", timeout=60)

    assert done.status == 0
    assert not (trap / "sprung").exists(), (trap / "sprung").read_text()


def test_without_a_user_krelay_tcp_relay_runs_as_nobody_else(world: World) -> None:
    world.serve("server", "tcp/80")
    program = up(world)
    relay = status(child(program, "tcp_relay"))
    uid = int(relay["Uid"][0])
    assert uid in DYNAMIC
    assert set(relay["Uid"] + relay["Gid"] + relay["Groups"]) == {str(uid)}
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(relay[kind][0], 16) == 0
    assert relay["NoNewPrivs"] == ["1"]
    assert f"tcp-relay runs as user id {uid}, which is nobody else's" in program.output

    path = world.root / "relay.sock"
    assert (path.stat().st_gid, path.stat().st_mode & 0o777) == (uid, 0o660)
    assert oct((world.root / "control.sock").stat().st_mode & 0o777) == "0o600"
    script = "import socket, sys; socket.socket(1, 5).connect(sys.argv[1])"
    as_other = ("setpriv", f"--reuid={uid + 1}", f"--regid={uid + 1}", "--clear-groups")
    other = world.lab.run(
        "relay", *as_other, "/usr/bin/python3", "-c", script, str(path), check=False
    )
    assert "PermissionError" in other.stderr
    assert world.who("client", 80).startswith(f"{world.client}:")


def test_two_of_them_are_two_users(world: World) -> None:
    programs = [
        up(world, "--gport", "16000"),
        up(world, "--gport", "17000", "--queue-num", "7000", "--services", "tcp/81", tree="other"),
    ]
    uids = {tuple(status(child(program, "tcp_relay"))["Uid"]) for program in programs}
    assert len(uids) == 2


def test_up_that_is_killed_takes_a_tcp_relay_of_another_user_with_it(world: World) -> None:
    program = up(world)
    pids = [child(program, module) for module in ("krelay", "tcp_relay")]
    program.kill()
    program.wait()
    world.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "both ended")


ACCOUNTS = """
for f in passwd group; do grep -v ^krelay: /etc/$f > {here}/$f; done
echo krelay:x:64990:64990::/nonexistent:/usr/sbin/nologin >> {here}/passwd
echo krelay:x:64990: >> {here}/group; echo second:x:64991:krelay >> {here}/group
mount --bind {here}/passwd /etc/passwd; mount --bind {here}/group /etc/group
"""


def test_user_krelay_gets_its_own_groups_and_none_of_roots(world: World) -> None:
    world.serve("server", "tcp/80")
    script = ACCOUNTS.format(here=world.lab.directory).replace("\n", "; ").strip("; ")
    words = shlex.join((*KRELAY, "up", "--root", str(world.root), "--real-ip", world.server))
    argv = ("unshare", "--mount", "sh", "-c", f"{script}; exec setpriv --groups 0,4,27 {words}")
    program = world.lab.start("relay", *argv)
    world.until(lambda: "Ctrl-C ends it" in program.output or program.poll() is not None, "up")
    relay = status(child(program, "tcp_relay"))

    assert set(relay["Uid"] + relay["Gid"]) == {"64990"}
    assert set(relay["Groups"]) == {"64990", "64991"}
    assert status(child(program, "krelay"))["Groups"] == ["64990"]  # whom it gives sockets to
    assert "tcp-relay runs as user krelay;" in program.output
    assert (world.root / "relay.sock").stat().st_gid == 64990
    assert world.who("client", 80).startswith(f"{world.client}:")


def test_what_up_inherits_its_children_do_not(world: World) -> None:
    lead = "umask 0; exec 7</etc/passwd 8>>/dev/null; trap '' HUP CHLD USR1"
    program = up(world, lead=lead)
    for module in ("krelay", "tcp_relay"):
        pid = child(program, module)
        held = {os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")}
        assert "/etc/passwd" not in held
        found = status(pid)
        assert found["Umask"] == ["0022"]
        for number in (signal.SIGHUP, signal.SIGCHLD, signal.SIGUSR1):
            assert not int(found["SigIgn"][0], 16) >> (number - 1) & 1
    assert (world.root.stat().st_mode & 0o777, (world.root / "gport").stat().st_mode & 0o777) == (
        0o755,
        0o644,
    )


def test_a_gateway_port_for_root_alone_is_refused_with_the_reason(world: World) -> None:
    options = ("--root", str(world.root), "--real-ip", world.server, "--gport", "900")
    program = world.lab.start("relay", *KRELAY, "up", *options)

    assert program.wait() == 1
    last = program.output.splitlines()[-1]
    assert last.startswith("krelay up: gport: 900 is a port for root alone, and tcp-relay runs as")
    assert not world.root.exists()


@pytest.mark.parametrize("options", [(), ("--workers", "2")])
def test_tcp_relay_becomes_the_user_that_is_named(world: World, options: tuple[str, ...]) -> None:
    world.serve("server", "tcp/80")
    world.start_krelay("--relay-gid", "61210")
    world.put(gport=18000, services="tcp/80", real_ip=world.server)
    program = world.lab.start(
        *("relay", *PYTHON, "-m", "tcp_relay", "--root", str(world.root)),
        *("--user", "61209:61210", *options),
    )
    world.until(lambda: int(world.values("status")["tcp_relays"]) == 1 + bool(options), "it")
    world.put(start=1)
    world.until_state("running")
    world.until(lambda: world.values("status")["gateway_port"] == "served", "a listener")
    assert world.who("client", 80).startswith(f"{world.client}:")
    pids = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    for pid in (program.pid, *map(int, pids)):
        found = status(pid)
        assert (found["Uid"], found["Gid"]) == (["61209"] * 4, ["61210"] * 4)
        assert int(found["CapBnd"][0], 16) == 0

    # What it does later works as well: another port, its table, another krelay, its end.
    world.put(gport=18001)
    world.until(lambda: "listening gport=18001" in program.output, "the new port")
    world.until(lambda: world.who("client", 80), "relayed by it")
    for pid in map(int, pids or [str(program.pid)]):
        os.kill(pid, signal.SIGUSR1)
    world.until(lambda: "CLIENT" in program.output.upper(), "its table")
    world.kill(world.krelay_process)
    world.start_krelay("--relay-gid", "61210")
    world.until(lambda: int(world.values("status")["tcp_relays"]) == 1 + bool(options), "again")
    world.until(lambda: world.who("client", 80), "relayed after a restart")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert "Traceback" not in program.output


def test_tcp_relay_that_root_starts_keeps_the_low_ports_alone(world: World) -> None:
    world.start_krelay()
    world.put(gport=900, services="tcp/80", real_ip=world.server)
    program = world.start_tcp_relay()
    found = status(program.pid)
    assert [int(found[kind][0], 16) for kind in ("CapPrm", "CapEff", "CapBnd")] == [1 << 10] * 3
    assert found["NoNewPrivs"] == ["1"]


def test_tcpproxy_keeps_them_too_and_nothing_else(world: World) -> None:
    world.serve("server", "tcp/80")
    argv = (*PYTHON, "-m", "tcp_relay.tcpproxy", world.server, "80", "81")
    program = world.lab.start("relay", *argv)
    world.lab.wait_listening("relay", "tcp", 81)
    assert world.who("client", 81).startswith(f"{world.lab.address('relay', 'server')}:")
    found = status(program.pid)
    assert int(found["CapEff"][0], 16) == 1 << 10
    assert found["NoNewPrivs"] == ["1"]


def test_an_unknown_user_is_wrong_usage(world: World) -> None:
    done = world.lab.run("relay", *PYTHON, "-m", "tcp_relay", "--user", "no-such-user", check=False)
    assert done.status == 2
    assert "there is no user 'no-such-user'" in done.stderr
