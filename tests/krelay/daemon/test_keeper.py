"""The tree under a daemon: disks that are full or broken, trees that are taken away or replaced."""

import errno
import fcntl
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from knet.loop import Loop
from knet.roles import ADMIN
from knet.unixsock import Crowd, UnixListener
from krelay.daemon.keeper import CannotKeep, TreeKeeper
from krelay.daemon.troubles import OK
from krelay.host import reserve, treelock
from procfs_sim.ondisk import FileTree
from procfs_sim.state import Outcome, TreeState, applied_text, errors_text
from procfs_sim.tree import SETTINGS, in_force
from procfs_sim.watcher import TreeWatcher
from tests.tcp_relay.helpers import run_until
from tests.tools.logs import complaints
from tests.tools.nobody import NOBODY, Nobody, Somebody, needs_root, open_directory

ERRORS = ("EMFILE", "ENFILE", "ENOSPC", "EROFS", "EIO", "ENOMEM", "EPERM", "EDQUOT")


class Rig:
    """A keeper, and what a daemon does with it; a second passes when the test says so."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loop = Loop()
        self.state = TreeState()
        self.changed: list[str] = []
        try:
            self.keeper = TreeKeeper(self.loop, root, self.state, self._judged, self._texts)
        except BaseException:
            self.loop.close()
            raise
        self._judged(self.keeper.begin())
        self.connections: list[socket.socket] = []
        self.listener = UnixListener(
            self.loop,
            root,
            ADMIN,
            socket.SOCK_STREAM,
            lambda connection, _: self.connections.append(connection),
            str.encode,
            Crowd(10, 10),
        )
        self.keeper.sockets = (self.listener,)
        self.changed.clear()

    def _judged(self, outcome: Outcome) -> None:
        self.changed += sorted(outcome.changed)
        if (deadline := self.state.next_deadline()) is not None:
            self.loop.call_at(deadline, self.keeper.late)
        self.keeper.publish()

    def _texts(self) -> Mapping[str, str]:
        return {
            "status/state": "stopped\n",
            "status/applied": applied_text(self.state.config, self.state.generation),
            "status/errors": errors_text(self.state.errors),
        }

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def turn(self) -> None:
        """What is under way."""
        for _ in range(20):
            self.loop.call_soon(lambda: self.loop.call_soon(self.loop.stop))
            self.loop.run()

    def tick(self) -> None:
        self.keeper.on_time()
        self.turn()

    def until(self, condition: Callable[[], bool]) -> None:
        run_until(self.loop, condition)

    @property
    def is_shown(self) -> bool:
        """Whether all files show what is in force."""
        tree = FileTree(self.root)
        settings = {n: in_force(n, self.state.config) + "\n" for n in SETTINGS}
        status = {n: (self.root / n).read_text() for n in self._texts()}
        return tree.read_all() == settings and status == dict(self._texts())

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self.listener.close()
        self.keeper.close()
        self.loop.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "tree")
    yield rig
    rig.close()


class Disk:
    """Has writing below ondisk.py fail, as a disk does; what the test itself writes is as usual."""

    WRITING = ("pwrite", "ftruncate", "fchmod")

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.error: int | None = None
        self.failed = 0
        for name in self.WRITING:
            monkeypatch.setattr(os, name, self._wrapped(getattr(os, name)))
        self._open = os.open
        monkeypatch.setattr(os, "open", self._opened)

    def _wrapped(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            self._fail()
            return real(*given)

        return call

    def _opened(self, path: Any, how: int, *rest: Any, **named: Any) -> int:
        if how & os.O_CREAT and self.error in (errno.EROFS, errno.EMFILE, errno.ENFILE):
            self._fail()
        return self._open(path, how, *rest, **named)

    def _fail(self) -> None:
        if self.error is not None:
            self.failed += 1
            raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


# A disk that can't be written


@pytest.mark.parametrize("error", ERRORS)
def test_a_refused_text_stays_until_the_disk_can_be_written_again(
    rig: Rig, disk: Disk, error: str, caplog: pytest.LogCaptureFixture
) -> None:
    disk.error = getattr(errno, error)
    rig.write("gport", "abc\n")
    rig.turn()
    for _ in range(5):
        rig.tick()
    assert rig.state.config.gport == 16000
    assert "gport" in rig.state.errors
    assert (rig.root / "gport").read_text() == "abc\n"
    assert rig.keeper.state != OK
    assert complaints(caplog) == ["the file tree can't be kept; what is in force stays"]

    disk.error = None
    rig.tick()
    rig.tick()

    assert rig.is_shown
    assert list(rig.state.errors) == ["gport"]  # what was shown late is no text of the user's
    assert rig.keeper.state == OK
    assert rig.changed == []
    assert complaints(caplog) == ["the file tree can't be kept; what is in force stays"]


def test_a_write_that_fails_is_not_tried_again_by_its_own_events(rig: Rig, disk: Disk) -> None:
    disk.error = errno.ENOSPC
    rig.write("gport", "abc\n")
    rig.turn()
    failed = disk.failed
    rig.turn()
    rig.turn()

    assert disk.failed == failed


def test_a_text_that_the_full_disk_left_empty_is_no_new_value(rig: Rig, disk: Disk) -> None:
    rig.write("real_ip", "192.168.7.7\n")
    rig.turn()
    rig.changed.clear()
    disk.error = errno.ENOSPC
    rig.write("real_ip", "")
    rig.until(lambda: "real_ip" in rig.state.errors)
    rig.tick()
    assert str(rig.state.config.real_ip) == "192.168.7.7"
    assert (rig.root / "real_ip").read_text() == ""

    disk.error = None
    rig.tick()

    assert (rig.root / "real_ip").read_text() == "192.168.7.7\n"
    assert rig.changed == []


def test_what_a_user_writes_meanwhile_counts(rig: Rig, disk: Disk) -> None:
    disk.error = errno.ENOSPC
    rig.write("gport", "abc\n")
    rig.turn()
    rig.write("gport", "17000\n")
    rig.turn()
    assert rig.state.config.gport == 17000
    rig.tick()
    disk.error = None
    rig.tick()

    assert rig.is_shown
    assert rig.state.errors == {}


def test_a_file_that_is_gone_comes_back_when_there_is_room(rig: Rig, disk: Disk) -> None:
    disk.error = errno.ENOSPC
    (rig.root / "gport").unlink()
    rig.turn()
    rig.tick()
    assert not (rig.root / "gport").exists()  # an empty one would have to be judged
    assert rig.state.errors == {}

    disk.error = None
    rig.tick()

    assert rig.is_shown


def test_what_is_half_written_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = FileTree(tmp_path / "tree")
    tree.create()
    (tree.root / "services").write_text("tcp/80 tcp/443")
    real = os.pwrite

    def some(fd: int, data: bytes, at: int) -> int:
        if at >= 10:
            monkeypatch.setattr(os, "pwrite", real)
            raise OSError(errno.ENOSPC, "full")
        return real(fd, data[:10], at)

    monkeypatch.setattr(os, "pwrite", some)
    with pytest.raises(OSError, match="full"):
        tree.show("services", "udp/53 tcp/8000-8100 tcp/9999\n")

    assert (tree.root / "services").read_text() == "tcp/80 tcp/443"


def test_the_reserve_is_given_for_what_finds_no_room(rig: Rig, disk: Disk) -> None:
    assert (rig.root / reserve.NAME).stat().st_size == reserve.SIZE
    gone: list[bool] = []

    def fail() -> None:
        if (rig.root / reserve.NAME).stat().st_size > reserve.SIZE // 2:
            raise OSError(errno.ENOSPC, "full")
        gone.append(True)

    disk._fail = fail  # type: ignore[method-assign]
    rig.write("gport", "abc\n")
    rig.turn()

    assert gone
    assert rig.is_shown
    assert rig.keeper.state == f"{reserve.NAME}: No space left on device"
    assert (rig.root / reserve.NAME).stat().st_size == reserve.SIZE // 2  # no more than it takes
    disk._fail = lambda: None  # type: ignore[method-assign]
    rig.tick()
    assert (rig.root / reserve.NAME).stat().st_size == reserve.SIZE
    assert rig.keeper.state == OK


def test_a_status_file_that_cannot_be_written_is_written_later(rig: Rig) -> None:
    path = rig.root / "status" / "errors"
    path.unlink()
    path.mkdir()
    (path / "mine").touch()
    rig.write("gport", "abc\n")
    rig.turn()
    assert rig.keeper.state == "status/errors: Is a directory"
    assert (path / "mine").exists()
    shutil.rmtree(path)
    rig.tick()

    assert rig.is_shown
    assert rig.keeper.state == OK


def test_what_cannot_be_read_is_read_later(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    real = FileTree.read

    def read(tree: FileTree, name: str) -> str | None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(FileTree, "read", read)
    rig.write("gport", "17000\n")
    rig.turn()
    rig.tick()
    assert (rig.state.config.gport, rig.keeper.state) == (16000, "gport: Too many open files")
    monkeypatch.setattr(FileTree, "read", real)
    rig.tick()

    assert (rig.state.config.gport, rig.keeper.state) == (17000, OK)


# A tree that is taken away


def replaced(rig: Rig) -> Path:
    """Another folder is in the tree's place; where the tree is now."""
    away = rig.root.with_name("away")
    other = rig.root.with_name("other")
    other.mkdir(exist_ok=True)
    rig.root.rename(away)
    other.rename(rig.root)
    return away


def test_another_folder_becomes_the_tree_and_connections_stay(rig: Rig) -> None:
    rig.write("gport", "17000\n")
    rig.turn()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(rig.root / "control.sock"))
    rig.turn()
    replaced(rig)
    rig.turn()

    assert rig.is_shown
    assert rig.state.config.gport == 17000
    assert rig.keeper.state == OK
    assert treelock.is_served(rig.root)
    again = socket.socket(socket.AF_UNIX)
    again.connect(str(rig.root / "control.sock"))
    connection.send(b"still open")
    rig.write("gport", "18000\n")
    rig.turn()
    assert rig.state.config.gport == 18000
    for each in (connection, again):
        each.close()


def in_its_place(what: str) -> Callable[[Path], object]:
    def folder(root: Path) -> None:
        (root / "control.sock").mkdir(parents=True)
        (root / "control.sock" / "mine").touch()

    def linked(root: Path) -> None:
        root.mkdir()
        root.with_name("elsewhere").mkdir()
        (root / "timeouts").symlink_to(root.with_name("elsewhere"))

    def shared(root: Path) -> None:
        root.mkdir()
        root.chmod(0o777)

    def theirs(root: Path) -> None:
        root.mkdir()
        os.chown(root, NOBODY, NOBODY)

    return {
        "a file": lambda root: root.write_text("mine"),
        "a link to nowhere": lambda root: root.symlink_to(root.with_name("nowhere") / "x"),
        "a folder with one at control.sock": folder,
        "a folder with a link in it": linked,
        "a folder that all may write": shared,
        "another's folder": theirs,
    }[what]


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("a file", "Not a directory"),
        ("a link to nowhere", "exists|Not a directory|No such"),
        ("a folder with one at control.sock", "is in the way and no socket"),
        ("a folder with a link in it", "is a symbolic link, owner"),
        ("a folder that all may write", "may be written by others"),
        pytest.param("another's folder", "belongs to nobody", marks=needs_root),
    ],
)
def test_what_cannot_be_the_tree_is_left_alone_until_it_goes(
    rig: Rig, what: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig.write("real_ip", "192.168.7.7\n")
    rig.turn()
    rig.root.rename(rig.root.with_name("away"))
    in_its_place(what)(rig.root)
    before = [(path, path.lstat().st_ino) for path in sorted(rig.root.rglob("*"))]
    rig.turn()
    for _ in range(3):
        rig.tick()
    assert str(rig.state.config.real_ip) == "192.168.7.7"
    assert re.search(why, rig.keeper.state), rig.keeper.state
    now = [(path, path.lstat().st_ino) for path in sorted(rig.root.rglob("*"))]
    assert set(before) <= set(now)
    assert complaints(caplog).count("the file tree can't be kept; what is in force stays") == 1

    if rig.root.is_dir() and not rig.root.is_symlink():
        shutil.rmtree(rig.root)
    else:
        rig.root.unlink()
    rig.tick()
    rig.tick()

    assert rig.is_shown
    assert rig.keeper.state == OK
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(rig.root / "control.sock"))


def test_a_folder_whose_lock_another_holds_is_taken_when_he_goes(rig: Rig) -> None:
    other = rig.root.with_name("other")
    other.mkdir()
    theirs = treelock.take(other)
    assert theirs is not None
    replaced(rig)
    (rig.root / "gport").write_text("19000\n")
    rig.turn()
    rig.tick()
    assert rig.keeper.state == f"another process serves {rig.root}"
    assert (rig.root / "gport").read_text() == "19000\n"
    assert rig.state.config.gport == 16000
    os.close(theirs)
    rig.tick()

    assert rig.is_shown
    assert treelock.is_served(rig.root)


@needs_root
def test_a_reader_locks_the_new_folder_in_vain() -> None:
    with open_directory() as directory:
        rig = Rig(directory / "tree")
        other = directory / "other"
        other.mkdir()
        with Nobody(lambda: fcntl.flock(os.open(other, os.O_RDONLY), fcntl.LOCK_EX)) as nobody:
            assert nobody.said == "None"
            replaced(rig)
            rig.turn()
            assert rig.keeper.state == OK
        rig.close()


def test_the_parent_may_go_and_come_back(rig: Rig) -> None:
    (rig.root / "deep").mkdir()
    away = rig.root.with_name("gone")
    rig.root.rename(away)
    rig.turn()
    assert rig.is_shown
    shutil.rmtree(rig.root)
    rig.turn()

    assert rig.is_shown
    assert rig.keeper.state == OK


@pytest.mark.parametrize("name", [treelock.NAME, "control.sock", reserve.NAME])
def test_what_is_removed_from_it_is_made_again(rig: Rig, name: str) -> None:
    (rig.root / name).unlink()
    rig.tick()
    rig.tick()

    assert (rig.root / name).exists()
    assert treelock.is_served(rig.root)
    assert rig.keeper.state == OK
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(rig.root / "control.sock"))


def test_a_directory_that_becomes_others_is_heeded_no_more(rig: Rig) -> None:
    rig.root.chmod(0o777)
    rig.write("gport", "17000\n")
    rig.turn()
    rig.tick()
    assert rig.state.config.gport == 16000
    assert "may be written by others" in rig.keeper.state
    rig.root.chmod(0o755)
    rig.tick()

    assert rig.is_shown
    assert rig.state.config.gport == 16000


def test_without_a_watch_the_tree_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = TreeWatcher

    def none_left(root: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("procfs_sim.follower.TreeWatcher", none_left)
    rig = Rig(tmp_path / "tree")
    assert "fs.inotify.max_user_instances" in rig.keeper.state
    rig.write("gport", "17000\n")
    rig.write("real_ip", "abc\n")
    rig.tick()
    rig.tick()
    assert rig.state.config.gport == 17000
    assert list(rig.state.errors) == ["real_ip"]
    assert rig.is_shown
    with (rig.root / "source").open("w") as writer:
        writer.write("rel")
        writer.flush()
        rig.tick()
        assert rig.state.errors.keys() == {"real_ip"}
        writer.write("ay")
    rig.tick()
    assert rig.state.config.source == "relay"
    monkeypatch.setattr("procfs_sim.follower.TreeWatcher", real)
    rig.tick()
    assert rig.keeper.state == OK
    rig.write("gport", "18000\n")
    rig.turn()
    assert rig.state.config.gport == 18000
    rig.close()


# Taking it at the start


def test_a_watch_that_cannot_be_waited_for_is_tried_again(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def add(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(rig.loop, "add", add)
        replaced(rig)
        rig.turn()
        assert rig.keeper.state == "Input/output error"
        rig.tick()
    rig.tick()

    assert rig.is_shown
    assert rig.keeper.state == OK
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_lock_that_cannot_be_looked_at_is_not_kept(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = treelock.holds

    def fails(root: Path, fd: int) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    replaced(rig)
    monkeypatch.setattr(treelock, "holds", fails)
    rig.turn()
    monkeypatch.setattr(treelock, "holds", real)
    rig.tick()

    assert rig.is_shown
    assert rig.keeper.state == OK


def test_a_tree_is_kept_by_one_alone(rig: Rig) -> None:
    with pytest.raises(CannotKeep, match=f"another krelay serves {rig.root}; stop it"):
        Rig(rig.root)


@needs_root
def test_the_tree_of_another_user_is_not_taken() -> None:
    with open_directory(0o1777) as directory:
        root = directory / "tree"
        with Nobody(root.mkdir) as nobody:
            assert nobody.said == "None"
        with pytest.raises(
            CannotKeep, match=rf"^{root} belongs to nobody, .*; chown root {root}, "
        ):
            Rig(root)
        assert list(root.iterdir()) == []


def test_no_descriptor_is_left_by_losing_and_taking(rig: Rig) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        shutil.rmtree(rig.root)
        rig.root.write_text("in the way")
        rig.turn()
        rig.tick()
        rig.root.unlink()
        rig.tick()

    assert rig.is_shown
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.serial
def test_a_lease_of_another_is_not_waited_for(rig: Rig) -> None:
    """A file server may have one (fcntl(2)); who opens the file then waits for 45 seconds."""
    rig.write("gport", "abc\n")

    def lease() -> None:
        signal.signal(signal.SIGIO, signal.SIG_IGN)
        fcntl.fcntl(os.open(rig.root / "gport", os.O_RDWR), fcntl.F_SETLEASE, fcntl.F_WRLCK)

    with Somebody(lease) as somebody:
        assert somebody.said == "None"
        began = time.monotonic()
        rig.turn()
        rig.tick()
        assert time.monotonic() - began < 1
    rig.turn()
    rig.tick()
    rig.tick()

    assert list(rig.state.errors) == ["gport"]
    assert rig.is_shown


@pytest.mark.parametrize("name", ["gport", "services", "timeouts/udp"])
@pytest.mark.parametrize("text", ["abc\n", ""])
def test_who_finds_his_text_put_back_finds_the_reason_there(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, name: str, text: str
) -> None:
    found: list[str] = []
    put_back = FileTree.show_if

    def looks(tree: FileTree, which: str, judged: str | None, shown: str) -> None:
        found.append((rig.root / "status/errors").read_text())
        put_back(tree, which, judged, shown)

    monkeypatch.setattr(FileTree, "show_if", looks)
    rig.write(name, text)
    rig.until(lambda: bool(found))
    assert found[0].startswith(f"{name}: ")
