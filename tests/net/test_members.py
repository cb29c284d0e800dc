"""What members of the three groups can do, and what they can't keep others from.

The groups are in a file that krelay alone sees in place of /etc/group; members are processes with
such a group's number, root in nothing.
"""

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from knet.unixsock import RESERVE
from krelay.control import client
from krelay_vm import Program
from tests.net.test_resources import descriptors
from tests.net.world import PYTHON, World, control_socket

pytestmark = [
    pytest.mark.net,
    pytest.mark.one_datapath("who may ask doesn't depend on what rewrites packets"),
]

NOBODY = 65534
RELAY, ADMIN, VIEW = 64990, 64991, 64992
GROUPS = f"root:x:0:\nkrelay:x:{RELAY}:\nkrelay-admin:x:{ADMIN}:\nkrelay-view:x:{VIEW}:\n"
DESCRIPTORS = 256

HOG = """
import resource, socket, sys, time
kind, path, count, said = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4].encode()
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = []
for _ in range(count):
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.settimeout(0.3)
    try:
        sock.connect(path)
        if said:
            sock.sendall(said)
        held.append(sock)
    except OSError:
        pass
print(len(held), flush=True)
time.sleep(100)
"""

STORM = """
import socket, sys
path, said = sys.argv[1], sys.argv[2].encode()
print("storm", flush=True)
while True:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(1)
        try:
            sock.connect(path)
            if said:
                sock.sendall(said)
                while sock.recv(1 << 20):
                    sock.sendall(said)
        except OSError:
            pass
"""


def start_with_groups(world: World, *limits: str) -> Program:
    """krelay on a host that has the groups; `limits` are prlimit's."""
    groups = world.lab.directory / "group"
    groups.write_text(GROUPS)
    program = world.lab.start(
        "relay", *(("prlimit", *limits) if limits else ()),
        "unshare", "--mount", "sh", "-c", 'mount --bind "$1" /etc/group; shift; exec "$@"', "sh",
        str(groups), *PYTHON, "-m", "krelay", "daemon", "--root", str(world.root),
    )  # fmt: skip
    world.krelay_process = program
    world.until(lambda: program.poll() is not None or world.answers(world.root), "an answer")
    assert program.poll() is None, program.output
    return program


def relay_with_groups(world: World, *limits: str) -> None:
    """All of it, as World.begin has it."""
    start_with_groups(world, *limits)
    world.put(gport=18000, services="tcp/80 udp/7 udp/53", real_ip=world.server)
    world.start_tcp_relay()
    world.put(start=1)
    world.until_state("running")


@pytest.fixture
def grouped(world: World) -> World:
    """Relaying on a host that has the groups."""
    world.serve("server", "tcp/80", "udp/7", "udp/53")
    world.lab.directory.chmod(0o755)
    relay_with_groups(world, f"--nofile={DESCRIPTORS}:{DESCRIPTORS}")
    return world


@pytest.fixture(scope="module")
def shared_grouped() -> Iterator[World]:
    """The same for several tests, each of which ends what it has started (`calm`)."""
    with World() as world:
        world.serve("server", "tcp/80", "udp/7", "udp/53")
        world.lab.directory.chmod(0o755)
        relay_with_groups(world, f"--nofile={DESCRIPTORS}:{DESCRIPTORS}")
        yield world


@pytest.fixture
def calm(shared_grouped: World) -> Iterator[World]:
    """Relaying on a host that has the groups, with nothing of the tests before."""
    world = shared_grouped
    before, programs = descriptors(world.krelay_process), len(world.lab.programs)
    yield world
    for program in world.lab.programs[programs:]:
        program.kill()
    world.until(lambda: descriptors(world.krelay_process) == before, "no connection left", 20)
    for program in (world.krelay_process, world.tcp_relay_process):
        assert program.poll() is None
        assert "Traceback" not in program.output


def member(gid: int, *words: str, supplementary: bool = False) -> tuple[str, ...]:
    """A command as somebody of that group."""
    groups = (
        (f"--regid={NOBODY}", f"--groups={gid}")
        if supplementary
        else (f"--regid={gid}", "--clear-groups")
    )
    return ("setpriv", f"--reuid={NOBODY}", *groups, *words)


def hog(world: World, gid: int, kind: int, path: str, count: int, said: str = "") -> Program:
    """A member who holds as many connections as he gets."""
    words = (sys.executable, "-I", "-S", "-c", HOG, str(kind), str(world.root / path), str(count))
    program = world.lab.start("relay", "prlimit", "--nofile=4096:4096", *member(gid, *words, said))
    world.until(lambda: program.output.strip() or program.poll() is not None, "a hog", 60)
    return program


def asked(world: World, path: str, request: str, gid: int) -> str:
    """What a member of this group hears at this socket."""
    words = ("socat", "-t5", "-", f"UNIX-CONNECT:{world.root}/{path}")
    done = world.lab.run("relay", *member(gid, *words), input=request + "\n", check=False)
    return done.stdout + done.stderr


def reaches(world: World, address: str) -> bool:
    """Whether a client is served at this address of the relay's."""
    try:
        return world.who("client", 80, to=address).startswith(f"{world.client}:")
    except OSError:
        return False


def is_served(world: World) -> float:
    """The slowest of some clients, in seconds."""
    slowest = 0.0
    for _ in range(5):
        began = time.monotonic()
        assert world.who("client", 80).startswith(f"{world.client}:")
        assert world.who_udp("client", 7).startswith(f"{world.client}:")
        slowest = max(slowest, time.monotonic() - began)
    return slowest


@pytest.mark.parametrize("supplementary", [False, True])
@pytest.mark.parametrize(
    ("gid", "path", "request_line", "answer"),
    [
        (VIEW, "view.sock", "show status", "state=running"),
        (VIEW, "view.sock", "show nat", "\n"),
        (VIEW, "view.sock", "kill 1", "error: kill isn't for view.sock"),
        (VIEW, "view.sock", "flush", "error: flush isn't for view.sock"),
        (VIEW, "view.sock", "trace pcap", "error: trace pcap isn't for view.sock"),
        (VIEW, "control.sock", "show status", "Permission denied"),
        (VIEW, "relay.sock", "x", "Permission denied"),
        (ADMIN, "control.sock", "show status", "state=running"),
        (ADMIN, "control.sock", "flush", "flushed=0"),
        (ADMIN, "relay.sock", "x", "Permission denied"),
        (RELAY, "control.sock", "show status", "Permission denied"),
        (RELAY, "view.sock", "show status", "Permission denied"),
        (NOBODY, "view.sock", "show status", "Permission denied"),
    ],
)
def test_each_group_has_its_socket_and_no_other(
    module_grouped: World,
    gid: int,
    path: str,
    request_line: str,
    answer: str,
    supplementary: bool,
) -> None:
    world = module_grouped
    words = ("socat", "-t5", "-", f"UNIX-CONNECT:{world.root}/{path}")
    command = member(gid, *words, supplementary=supplementary)
    done = world.lab.run("relay", *command, input=request_line + "\n", check=False)
    assert answer in done.stdout + done.stderr


@pytest.fixture(scope="module")
def module_grouped() -> Iterator[World]:
    """Served, but not relaying, for tests that change nothing."""
    with World() as world:
        world.lab.directory.chmod(0o755)
        start_with_groups(world)
        world.put(start=1)
        world.until_state("running")
        yield world


def command(world: World, gid: int, *words: str) -> tuple[int, str]:
    """Exit status and what a member of this group sees of a krelay command."""
    argv = (*PYTHON, "-m", "krelay", *words[:1], "--root", str(world.root), *words[1:])
    done = world.lab.run("relay", *member(gid, *argv), check=False)
    return done.status, done.stdout + done.stderr


@pytest.fixture(scope="module")
def others_run_python() -> None:
    """Skips where they can't."""
    program = (sys.executable, "-c", "import krelay.cli.main")
    command = ("setpriv", f"--reuid={NOBODY}", "--clear-groups", *program)
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("others can't run this Python here")


@pytest.mark.usefixtures("others_run_python")
@pytest.mark.parametrize(
    ("gid", "words", "status", "said"),
    [
        (VIEW, ("status",), 0, "running"),
        (VIEW, ("nat",), 0, ""),
        (VIEW, ("kill", "7"), 1, "usermod -aG krelay-admin USER"),
        (ADMIN, ("kill", "7"), 1, "no flow 7"),
        (RELAY, ("status",), 1, "usermod -aG krelay-view USER"),
        (NOBODY, ("trace",), 1, "usermod -aG krelay-view USER"),
    ],
)
def test_commands_of_members_say_what_is_missing(
    module_grouped: World, gid: int, words: tuple[str, ...], status: int, said: str
) -> None:
    found, text = command(module_grouped, gid, *words)
    assert (found, said in text) == (status, True), text
    assert "Traceback" not in text


def test_who_gets_to_the_relay_socket_past_its_mode_is_told_the_group(grouped: World) -> None:
    grouped.root.joinpath("relay.sock").chmod(0o666)
    program = (
        "import socket, sys; s = socket.socket(1, 5); s.connect(sys.argv[1]); s.settimeout(30)\n"
        "print(s.recv(4096).decode()); print(s.recv(1))"
    )
    words = (sys.executable, "-I", "-S", "-c", program, str(grouped.root / "relay.sock"))
    told, end = grouped.lab.run("relay", *member(VIEW, *words)).stdout.splitlines()

    assert "join the group krelay (usermod" in json.loads(told)["error"]
    assert end == "b''"
    assert grouped.values("status")["tcp_relays"] == 1


@pytest.mark.serial
@pytest.mark.parametrize(
    ("gid", "path", "said"),
    [
        (ADMIN, "control.sock", "trace\n"),
        (VIEW, "view.sock", "trace\n"),
        (ADMIN, "control.sock", "trace pcap verdict=rewrite,drop,pass\n"),
        (ADMIN, "control.sock", ""),
        (VIEW, "view.sock", "show nat json\n" * 200),
    ],
)
def test_members_who_ask_as_often_as_they_can_keep_nobody_out(
    calm: World, gid: int, path: str, said: str
) -> None:
    before = is_served(calm)
    hog(calm, gid, socket.SOCK_STREAM, path, 200, said)
    assert calm.ask("show status")[0] == "state=running"
    with control_socket(calm.root) as tracer:
        tracer.sendall(b"trace proto=tcp\n")
        slowest = is_served(calm)
        assert b" flow " in tracer.recv(1000)
    print(f"\n    slowest client {before:.3f} s before, {slowest:.3f} s now", end="")
    assert slowest < before + 0.5


@pytest.mark.serial
@pytest.mark.parametrize("said", ["", "show nat json\n", "show counters\n", "trace\n", "kill 1\n"])
def test_members_who_come_without_pause_leave_packets_their_time(calm: World, said: str) -> None:
    before = is_served(calm)
    words = (sys.executable, "-I", "-S", "-c", STORM, str(calm.root / "control.sock"), said)
    for _ in range(2):
        program = calm.lab.start("relay", *member(ADMIN, *words))
        calm.until(lambda: "storm" in program.output, "a storm")  # noqa: B023
    slowest = is_served(calm)
    began = time.monotonic()
    assert client.ask(calm.root, "show status")[0] == "state=running"
    answered = time.monotonic() - began
    print(
        f"\n    slowest {before:.3f} s before, {slowest:.3f} now, root's answer {answered:.3f}",
        end="",
    )
    assert slowest < before + 0.5
    assert answered < 2.0


def test_members_who_connect_to_the_relay_socket_leave_krelay_its_descriptors(
    grouped: World,
) -> None:
    hog(grouped, RELAY, socket.SOCK_SEQPACKET, "relay.sock", 1000)
    opened = len(descriptors(grouped.krelay_process))
    print(f"\n    {opened} of {DESCRIPTORS} descriptors are open", end="")
    assert opened <= DESCRIPTORS - RESERVE
    grouped.lab.run("relay", "ip", "addr", "add", "10.77.3.77/24", "dev", "eth1")
    grouped.put(services="tcp/80 udp/7 udp/53 udp/99")
    grouped.until(lambda: reaches(grouped, "10.77.3.77"), "the new address relayed")
    is_served(grouped)
    with suppress(OSError):
        grouped.kill(grouped.tcp_relay_process)
    grouped.until(lambda: grouped.values("status")["tcp_relays"] != 0, "still others")
    assert grouped.krelay_process.poll() is None


def test_many_members_leave_root_a_place_for_its_tcp_relay(grouped: World) -> None:
    grouped.kill(grouped.tcp_relay_process)
    hog(grouped, RELAY, socket.SOCK_SEQPACKET, "relay.sock", 1000)
    program = grouped.lab.start("relay", *PYTHON, "-m", "tcp_relay", "--root", str(grouped.root))
    grouped.until(lambda: "listening gport=" in program.output, "tcp-relay listening")
    grouped.until(
        lambda: grouped.who("client", 80).startswith(f"{grouped.client}:") or None, "served", 10
    )


@pytest.mark.parametrize("limit", [40, 64, 128])
def test_with_few_descriptors_and_all_of_them_asked_for_settings_still_change(
    world: World, limit: int
) -> None:
    """Also by root, who has no share but what is there."""
    world.serve("server", "tcp/80", "udp/7", "udp/53")
    world.lab.directory.chmod(0o755)
    relay_with_groups(world, f"--nofile={limit}:{limit}")
    for kind, path in ((socket.SOCK_SEQPACKET, "relay.sock"), (socket.SOCK_STREAM, "view.sock")):
        words = (sys.executable, "-I", "-S", "-c", HOG, str(kind), str(world.root / path), "300")
        program = world.lab.start("relay", "prlimit", "--nofile=4096:4096", *words, "")
        world.until(lambda: program.output.strip(), "a hog", 60)  # noqa: B023
    world.lab.run("relay", "ip", "addr", "add", "10.77.3.77/24", "dev", "eth1")
    world.put(services="tcp/80 udp/7 udp/53 udp/99")
    world.until(lambda: reaches(world, "10.77.3.77"), "the new address relayed")
    for flag, state in ((0, "stopped"), (1, "running")):
        world.put(start=flag)
        world.until_state(state)
    is_served(world)
    assert world.krelay_process.poll() is None
    assert "Traceback" not in world.krelay_process.output
