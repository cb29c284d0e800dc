"""What was written to a tree, as the kernel tells it, and as it is seen where it can't tell."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from knet.loop import Loop
from procfs_sim.follower import TreeFollower
from procfs_sim.ondisk import FileTree


class Following:
    """A follower, and how often it was called."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.loop = Loop()
        self.calls = 0
        FileTree(root).create()
        self.follower = TreeFollower(self.loop, root, self._changed)

    def _changed(self) -> None:
        self.calls += 1

    def write(self, name: str, text: str) -> None:
        (self.root / name).write_text(text)

    def turn(self) -> None:
        self.loop.call_soon(lambda: self.loop.call_soon(self.loop.stop))
        self.loop.run()

    def close(self) -> None:
        self.follower.stop()
        self.loop.close()


@pytest.fixture
def following(tmp_path: Path) -> Iterator[Following]:
    following = Following(tmp_path / "tree")
    yield following
    following.close()


def without_watch(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def none_left(root: Path) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr("procfs_sim.follower.TreeWatcher", none_left)


def test_what_is_written_is_told(following: Following) -> None:
    assert following.follower.watch() is None
    assert following.follower.is_watching
    following.write("gport", "17000\n")
    following.turn()
    assert following.calls
    assert following.follower.changes() == {"gport": "17000\n"}


def test_without_a_watch_left_what_differs_is_seen(
    following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_watch(monkeypatch, errno.ENOSPC)
    error = following.follower.watch()
    assert error is not None
    assert error.errno == errno.ENOSPC
    assert not following.follower.is_watching
    following.follower.read_all()
    assert following.follower.look() == {}
    following.write("gport", "17000\n")
    with (following.root / "source").open("w") as writer:
        writer.write("rel")
        writer.flush()
        assert following.follower.look() == {"gport": "17000\n"}
        writer.write("ay\n")
    assert following.follower.look() == {"source": "relay\n"}
    assert following.follower.look() == {}


def test_other_errors_of_watching_are_raised_and_leave_no_descriptor(
    following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = len(os.listdir("/proc/self/fd"))

    def add(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(following.loop, "add", add)
    with pytest.raises(OSError, match="Input/output"):
        following.follower.watch()
    assert not following.follower.is_watching
    assert len(os.listdir("/proc/self/fd")) == before


def test_own_texts_are_no_news_and_unread_ones_are(
    following: Following, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_watch(monkeypatch, errno.EMFILE)
    following.follower.watch()
    following.follower.read_all()
    following.write("gport", "18000\n")
    following.follower.saw("gport", "18000\n")
    assert following.follower.look() == {}
    following.follower.forget("gport", OSError(errno.EIO, "it can't be read"))
    assert following.follower.look() == {"gport": "18000\n"}
