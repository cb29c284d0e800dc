"""What is told of a file tree that comes, changes and goes."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from krelay.loop import Loop
from procfs_sim import Config, FileTree
from tcp_relay.gport import TreeFollower
from tests.tcp_relay.helpers import run_until


class Rig:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.loop = Loop()
        self.told: list[Config] = []
        self.follower = TreeFollower(self.loop, root, self.told.append)

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
