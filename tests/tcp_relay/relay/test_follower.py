"""What is told of a file tree that comes, changes and goes."""

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from knet.loop import Loop
from procfs_sim import Config, FileTree
from procfs_sim.watcher import TreeWatcher
from tcp_relay.relay.follower import ConfigFollower
from tests.tcp_relay.helpers import run_until


class Rig:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.loop = Loop()
        self.told: list[Config] = []
        self.follower = ConfigFollower(self.loop, root, self.told.append)

    @property
    def ports(self) -> list[int]:
        return [config.gport for config in self.told]

    def run_until(self, condition: Callable[[], bool]) -> None:
        run_until(self.loop, condition)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    rig = Rig(tmp_path / "tree")
    with rig.loop:
        yield rig
        rig.follower.close()


def test_each_new_port_is_told_and_nothing_is_written(rig: Rig) -> None:
    FileTree(rig.root).create()
    rig.run_until(lambda: rig.ports == [16000])
    (rig.root / "gport").write_text("abc\n")
    (rig.root / "gport").write_text("16000\n")
    (rig.root / "gport").write_text("17000")
    rig.run_until(lambda: rig.ports[-1] == 17000)
    assert rig.ports == [16000, 17000]
    assert (rig.root / "gport").read_text() == "17000"  # krelay is who tidies it up


def test_a_tree_that_comes_late_is_found(rig: Rig) -> None:
    rig.run_until(lambda: rig.follower._is_waiting)
    assert not rig.told
    FileTree(rig.root).create()
    rig.run_until(lambda: rig.ports == [16000])


def test_a_tree_that_is_made_anew_is_followed_on(rig: Rig) -> None:
    FileTree(rig.root).create()
    rig.run_until(lambda: rig.ports == [16000])
    shutil.rmtree(rig.root)
    rig.run_until(lambda: rig.follower._is_waiting)
    FileTree(rig.root).create()
    (rig.root / "gport").write_text("18000\n")
    rig.run_until(lambda: rig.ports[-1] == 18000)


def test_a_new_server_is_told(rig: Rig) -> None:
    FileTree(rig.root).create()
    rig.run_until(lambda: len(rig.told) == 1)
    (rig.root / "real_ip").write_text("192.168.7.7\n")
    rig.run_until(lambda: len(rig.told) == 2)
    assert str(rig.told[1].real_ip) == "192.168.7.7"


# What else may become of a tree


def test_a_tree_that_others_can_change_is_followed_when_it_is_mended(
    rig: Rig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("krelay"), "propagate", True)
    FileTree(rig.root).create()
    rig.root.chmod(0o777)
    rig.run_until(lambda: rig.follower._is_waiting)
    assert not rig.told
    (record,) = [r for r in caplog.records if r.getMessage() == "can't read the file tree"]
    error = record.__dict__["fields"]["error"]
    assert error.startswith(f"{rig.root} (owner {rig.root.owner()}, mode 0777) may be written by ")
    rig.root.chmod(0o755)
    rig.run_until(lambda: rig.ports == [16000])


def test_what_is_written_once_others_can_change_it_does_not_count(rig: Rig) -> None:
    FileTree(rig.root).create()
    rig.run_until(lambda: rig.ports == [16000])
    (rig.root / "timeouts").chmod(0o777)
    (rig.root / "gport").write_text("17000\n")
    rig.run_until(lambda: rig.follower._is_waiting)
    assert rig.ports == [16000]
    (rig.root / "gport").write_text("18000\n")
    (rig.root / "timeouts").chmod(0o755)
    rig.run_until(lambda: len(rig.ports) > 1)
    assert rig.ports == [16000, 18000]


@pytest.mark.parametrize("error", [errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.ENOMEM])
def test_without_a_watch_the_tree_is_looked_at(
    rig: Rig, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(root: Path) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("procfs_sim.follower.TreeWatcher", none_left)
    monkeypatch.setattr("tcp_relay.relay.follower.LOOK", 0.05)
    FileTree(rig.root).create()
    rig.run_until(lambda: rig.ports == [16000])
    (rig.root / "gport").write_text("17000\n")
    rig.run_until(lambda: rig.ports == [16000, 17000])
    with (rig.root / "gport").open("w") as writer:
        writer.write("18")
        writer.flush()
        rig.loop.call_at(rig.loop.now + 0.2, rig.loop.stop)
        rig.loop.run()
        writer.write("000\n")
    rig.run_until(lambda: rig.ports == [16000, 17000, 18000])
    monkeypatch.setattr("procfs_sim.follower.TreeWatcher", TreeWatcher)
    rig.run_until(lambda: rig.follower._tree.is_watching)
    monkeypatch.setattr("tcp_relay.relay.follower.LOOK", 1000.0)
    (rig.root / "gport").write_text("19000\n")
    rig.run_until(lambda: rig.ports[-1] == 19000)


def test_what_cannot_be_read_now_is_read_soon(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    FileTree(rig.root).create()
    rig.run_until(lambda: rig.ports == [16000])
    real = FileTree.read
    failed: list[str] = []

    def read(tree: FileTree, name: str) -> str | None:
        if not failed:
            failed.append(name)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(tree, name)

    monkeypatch.setattr(FileTree, "read", read)
    (rig.root / "gport").write_text("17000\n")
    rig.run_until(lambda: rig.ports == [16000, 17000])
    assert failed == ["gport"]
