"""The file tree of a relay that serves: its disk, its place, its owner, and who else is about."""

import ctypes
import fcntl
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from krelay_vm import Program, Result
from tests.net.world import GPORT, PYTHON, SERVICES, World, echo, greet
from tests.tools.nobody import NOBODY, Nobody

pytestmark = pytest.mark.net

SIZE = 256 * 1024
"""Bytes of the small disk."""


class Disk:
    """A small disk that only the relay's programs see, and the tree on it; `here` leads there."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.path = world.lab.directory / "disk"
        self.path.mkdir()
        self._holder = self._start(
            "unshare", "-m", "sh", "-c",
            'mount -t tmpfs -o "size=$1,mode=755" tmpfs "$2" && echo mounted && exec sleep 1000',
            "sh", str(SIZE), str(self.path), inside=False,
        )  # fmt: skip
        world.until(lambda: "mounted" in self._holder.output, "the disk")
        self.tree = self.path / "tree"
        self.here = Path(f"/proc/{self._holder.pid}/root{self.path}")
        world.root = self.here / "tree"

    def begin(self) -> None:
        """krelay and tcp-relay on it, relaying."""
        world = self.world
        self.krelay = self._start(*PYTHON, "-m", "krelay", "daemon", "--root", str(self.tree))
        world.krelay_process = self.krelay
        world.until(lambda: world.answers(world.root), "an answer")
        world.put(gport=GPORT, services=SERVICES, real_ip=world.server, datapath=world.datapath)
        self.tcp_relay = self._start(*PYTHON, "-m", "tcp_relay", "--root", str(self.tree))
        world.until(lambda: "tcp_relays=1" in world.ask("show status"), "tcp-relay connected")
        world.put(start=1)
        world.until_state("running")

    def fill(self) -> None:
        """Not a block is left."""
        with (self.here / "fill").open("ab", buffering=0) as file, suppress(OSError):
            while file.write(b"x" * 512):
                pass

    def run(self, *command: str) -> Result:
        """A command that sees the disk."""
        return self.world.lab.run("relay", *self._inside(), *command, check=False)

    def _start(self, *command: str, inside: bool = True) -> Program:
        return self.world.lab.start("relay", *(self._inside() if inside else ()), *command)

    def _inside(self) -> tuple[str, ...]:
        return ("nsenter", f"--mount=/proc/{self._holder.pid}/ns/mnt", "--")


@pytest.fixture
def disk(world: World) -> Iterator[Disk]:
    world.serve("server", "tcp/80", "udp/7")
    disk = Disk(world)
    disk.begin()
    yield disk
    assert "Traceback" not in disk.krelay.output + disk.tcp_relay.output


def relays(world: World) -> None:
    """New conversations are relayed."""
    assert world.who("client", 80).startswith(f"{world.client}:")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")


def cpu_seconds(program: Program) -> float:
    fields = Path(f"/proc/{program.pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def warnings(program: Program) -> list[str]:
    return [line for line in program.output.splitlines() if "file tree can't be kept" in line]


# The disk


@pytest.mark.serial
def test_a_full_disk_ends_nothing_and_is_told_once(disk: Disk) -> None:
    world = disk.world
    connection = world.connect("client", 80)
    greet(connection)
    (disk.here / "tree" / ".reserve").unlink()  # it would do for all that follows
    disk.fill()
    (world.root / "timeouts" / "udp").write_text("")  # as a shell does whose write then fails
    disk.fill()
    world.write("gport", "abc")
    began, used = time.monotonic(), cpu_seconds(disk.krelay)
    time.sleep(1)

    assert (cpu_seconds(disk.krelay) - used) / (time.monotonic() - began) < 0.3
    echo(connection, b"goes on" * 1000)
    relays(world)
    assert "No space left on device" in world.values("status")["tree"]
    assert world.values("config")["timeouts/udp"] == "300"
    assert world.read("timeouts/udp") == ""
    assert len(warnings(disk.krelay)) == 1, warnings(disk.krelay)

    (disk.here / "fill").unlink()
    world.until(lambda: world.values("status")["tree"] == "ok", "the tree in order", 5)
    assert (world.read("timeouts/udp"), world.read("gport")) == ("300", str(GPORT))
    errors = world.read("status/errors").splitlines()
    assert [line.partition(":")[0] for line in errors] == ["gport", "timeouts/udp"]
    world.put(timeouts__udp=77)
    echo(connection, b"still")
    assert disk.krelay.output.count("the file tree is kept again") == 1


@pytest.mark.one_datapath("what is on the disk doesn't depend on it")
def test_the_reserve_lets_settings_be_written_on_a_full_disk(disk: Disk) -> None:
    world = disk.world
    disk.fill()
    (world.root / "timeouts" / "udp").write_text("")
    disk.fill()
    world.until(lambda: world.read("timeouts/udp") == "300", "the value in force", 5)
    world.put(timeouts__udp=77)
    assert world.values("status")["tree"] == ".reserve: No space left on device"
    relays(world)


@pytest.mark.one_datapath("what is on the disk doesn't depend on it")
def test_a_tree_that_becomes_read_only_is_relayed_on_and_left_in_order(disk: Disk) -> None:
    world = disk.world
    connection = world.connect("client", 80)
    greet(connection)
    rules = world.rules()
    done = disk.run("mount", "-o", "remount,ro", str(disk.path))
    assert done.status == 0, done.stderr
    done = disk.run(*PYTHON, "-m", "krelay", "set", "timeouts/udp", "99", "--root", str(disk.tree))
    assert (done.status, done.stderr) == (
        1,
        f"krelay set: {disk.tree}/timeouts/udp can't be written: Read-only file system\n",
    )
    disk.krelay.signal(signal.SIGHUP)
    time.sleep(1.5)
    echo(connection, b"goes on")
    relays(world)
    disk.krelay.signal(signal.SIGTERM)

    assert disk.krelay.wait() == 0
    assert world.rules() != rules
    assert "krelay" not in world.rules()


@pytest.mark.one_datapath("what is on the disk doesn't depend on it")
def test_an_unmounted_tree_is_made_again_below(disk: Disk) -> None:
    world = disk.world
    connection = world.connect("client", 80)
    greet(connection)
    assert disk.run("umount", "-l", str(disk.path)).status == 0
    world.until(lambda: (world.root / "gport").exists(), "the tree", 5)
    world.until(lambda: world.answers(world.root), "an answer", 5)
    world.until(lambda: world.values("status")["tree"] == "ok", "the tree in order", 5)

    assert world.read("gport") == str(GPORT)
    echo(connection, b"goes on")
    relays(world)
    world.put(timeouts__udp=77)


# Its place


def served(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    world.begin()


def exchange(one: Path, other: Path) -> None:
    """Swaps two names in one step (renameat2(2)): krelay makes a tree that is missing at once."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    assert libc.renameat2(here, bytes(one), here, bytes(other), swap) == 0, ctypes.get_errno()


@pytest.mark.parametrize("control", ["a folder", "free"])
def test_another_folder_in_its_place_ends_no_connection(world: World, control: str) -> None:
    served(world)
    connection = world.connect("client", 80)
    greet(connection)
    away = world.lab.directory / "away"
    away.mkdir()
    if control == "a folder":
        (away / "control.sock" / "mine").mkdir(parents=True)
    exchange(away, world.root)
    world.until(lambda: (world.root / "status/state").exists(), "the tree", 5)

    assert world.read("gport") == str(GPORT)
    echo(connection, b"goes on")
    relays(world)
    assert "tcp-relay disconnected" not in world.krelay_process.output
    if control == "a folder":
        (status,) = [line for line in world.ask("show status", away) if line.startswith("tree=")]
        assert "control.sock" in status
        assert (world.root / "control.sock" / "mine").is_dir()
        shutil.rmtree(world.root / "control.sock")
    world.until(lambda: world.answers(world.root), "an answer", 5)
    world.until(lambda: world.values("status")["tree"] == "ok", "the tree in order", 5)
    world.put(timeouts__udp=77, gport=GPORT + 1)
    world.until(
        lambda: f"listening gport={GPORT + 1}" in world.tcp_relay_process.output,
        "tcp-relay at the new port",
        5,
    )
    relays(world)
    echo(connection, b"still")
    assert "Traceback" not in world.krelay_process.output


@pytest.mark.parametrize("what", ["a file", "a link", "a locked folder", "a shared folder"])
def test_what_cannot_be_its_tree_leaves_krelay_relaying(world: World, what: str) -> None:
    served(world)
    connection = world.connect("client", 80)
    greet(connection)
    away, root = world.lab.directory / "away", world.root
    lock = -1
    if what == "a file":
        away.write_text("")
    elif what == "a link":
        away.symlink_to("/nowhere/at/all")
    else:
        away.mkdir()
        (away / ".lock").touch(0o600)
        away.chmod(0o777 if what == "a shared folder" else 0o755)
        lock = os.open(away / ".lock", os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    exchange(away, root)
    time.sleep(2.5)

    echo(connection, b"goes on")
    relays(world)
    (state,) = [line for line in world.ask("show status", away) if line.startswith("tree=")]
    assert state != "tree=ok"
    assert len(warnings(world.krelay_process)) == 1
    if lock >= 0:
        assert not (root / "gport").exists()
        os.close(lock)
        root.chmod(0o755)
    else:
        root.unlink()
    world.until(lambda: world.answers(root), "an answer", 5)
    assert world.read("gport") == str(GPORT)
    echo(connection, b"still")


# Whose it is


@pytest.fixture
def foreign(world: World) -> Path:
    """A tree that nobody has made where all may make something, with values of his own."""
    shared = world.lab.directory / "shared"
    shared.mkdir()
    shared.chmod(0o1777)
    root = shared / "tree"

    def make() -> None:
        for name in ("timeouts", "limits", "status"):
            (root / name).mkdir(parents=True)
        for name, text in (("real_ip", world.server), ("start", "1"), ("gport", str(GPORT))):
            (root / name).write_text(f"{text}\n")

    with Nobody(make) as nobody:
        assert nobody.said == "None"
    return root


COMMANDS = {
    "daemon": ("krelay", "daemon"),
    "up": ("krelay", "up", "--real-ip", "10.77.3.1"),
    "set": ("krelay", "set", "timeouts/udp", "99"),
    "start": ("krelay", "start"),
    "stop": ("krelay", "stop"),
    "clean": ("krelay", "clean"),
    "tcp-relay": ("tcp_relay",),
}


def unread(folder: Path) -> dict[Path, tuple[int, ...]]:
    """All that is there, as it is; but for when it was read last, which looking changes."""
    return {
        path: (at.st_mode, at.st_ino, at.st_uid, at.st_gid, at.st_size, at.st_ctime_ns)
        for path in folder.rglob("*")
        for at in (path.lstat(),)
    }


@pytest.mark.one_datapath("nothing is relayed")
@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("fault", ["owner", "mode", "timeouts", "above"])
def test_a_tree_that_others_can_change_is_refused(
    world: World, foreign: Path, words: tuple[str, ...], fault: str
) -> None:
    if fault != "owner":
        for path in (foreign, *foreign.rglob("*")):
            os.chown(path, 0, 0)
    bad = {"timeouts": foreign / "timeouts", "above": foreign.parent}.get(fault, foreign)
    if fault == "mode":
        bad.chmod(0o770)
    elif fault == "timeouts":
        os.chown(bad, NOBODY, -1)
    elif fault == "above":
        bad.chmod(0o777)
    before = unread(foreign)
    rules = world.rules()

    done = world.lab.run(
        "relay", *PYTHON, "-m", *words, "--root", str(foreign), check=False, timeout=30
    )

    name = "tcp-relay" if words == ("tcp_relay",) else f"krelay {words[1]}"
    owner = "nobody" if fault in ("owner", "timeouts") else "root"
    assert done.status == 1, done
    assert re.fullmatch(rf"{name}: {bad} [^\n]*\b{owner}\b[^\n]*\n", done.stderr), done.stderr
    assert unread(foreign) == before
    assert world.rules() == rules


# Who may only read


def test_a_reader_with_locks_on_all_files_keeps_krelay_from_nothing(world: World) -> None:
    served(world)
    connection = world.connect("client", 80)
    greet(connection)

    def lock_all() -> None:
        for path in (world.root, *world.root.rglob("*")):
            with suppress(OSError):
                fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX)

    with Nobody(lock_all):
        world.kill(world.krelay_process)
        world.start_krelay()
        world.until_state("running")
        world.until(lambda: "tcp_relays=1" in world.ask("show status"), "tcp-relay connected")
        echo(connection, b"goes on")
        relays(world)
        world.put(timeouts__udp=77)
        done = world.krelay("set", "timeouts/udp", "78")
        assert (done.status, done.stderr) == (0, "")
