"""The lock on a tree: one at a time, and for no longer than its process lives."""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from stat import S_IMODE

import pytest

from krelay.host.treelock import NAME, holds, is_served, take
from procfs_sim.ondisk import FileTree
from tests.tools.nobody import Nobody, as_nobody, needs_root, open_directory


def test_a_tree_is_served_while_the_descriptor_is_open(tmp_path: Path) -> None:
    assert not is_served(tmp_path)
    fd = take(tmp_path)
    assert fd is not None
    assert is_served(tmp_path)
    assert take(tmp_path) is None
    os.close(fd)

    assert not is_served(tmp_path)


def test_asking_whether_it_is_served_takes_nothing(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    assert not is_served(tmp_path)
    fd = take(tmp_path)
    assert fd is not None
    is_served(tmp_path)
    take(tmp_path)
    os.close(fd)

    assert os.listdir("/proc/self/fd") == before


def test_the_lock_dies_with_its_process(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from krelay.host.treelock import take\n"
        "assert take(Path(sys.argv[1])); print('taken', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"taken\n"
        assert is_served(tmp_path)
        assert take(tmp_path) is None
        other.kill()
        other.wait()

    assert not is_served(tmp_path)
    fd = take(tmp_path)
    assert fd is not None
    os.close(fd)


def test_children_do_not_keep_the_lock(tmp_path: Path) -> None:
    fd = take(tmp_path)
    assert fd is not None

    assert not os.get_inheritable(fd)
    os.close(fd)


def test_where_no_tree_is_there_is_nothing_to_take(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        with pytest.raises(OSError, match=name):
            take(tmp_path / name)
        assert not is_served(tmp_path / name)


# What others can do


def lock(path: Path) -> None:
    fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)


@needs_root
@pytest.mark.parametrize("where", ["", "gport", "status", "status/state"])
def test_who_may_only_read_can_not_keep_the_lock(where: str) -> None:
    with open_directory() as directory:
        root = directory / "tree"
        tree = FileTree(root)
        tree.create()
        tree.publish("status/state", "stopped\n")
        with Nobody(lambda: lock(root / where)) as nobody:
            assert nobody.said == "None"  # he has locked it
            assert not is_served(root)
            fd = take(root)
            assert fd is not None
            os.close(fd)


@needs_root
def test_nobody_else_can_open_the_lock_whatever_the_umask() -> None:
    before = os.umask(0)
    try:
        with open_directory() as root:
            fd = take(root)
            assert fd is not None
            assert as_nobody(lambda: lock(root / NAME)) == "PermissionError"
            assert as_nobody(lambda: is_served(root)) == "True"
            os.close(fd)
            assert as_nobody(lambda: is_served(root)) == "False"
    finally:
        os.umask(before)


@needs_root
@pytest.mark.parametrize("spoil", ["chmod 644", "chmod 660", "chown nobody"])
def test_a_lock_that_others_can_open_is_worth_nothing(spoil: str) -> None:
    with open_directory() as root:
        (root / NAME).touch()
        subprocess.run([*spoil.split(), str(root / NAME)], check=True)
        before = (root / NAME).stat().st_ino
        fcntl.flock(other := os.open(root / NAME, os.O_RDONLY), fcntl.LOCK_EX)
        assert not is_served(root)
        fd = take(root)
        assert fd is not None
        assert is_served(root)
        found = (root / NAME).stat()
        assert (found.st_uid, S_IMODE(found.st_mode)) == (0, 0o600)
        assert found.st_ino != before
        os.close(fd)
        os.close(other)


@pytest.mark.parametrize("what", ["symlink", "dangling", "hard link", "directory", "fifo"])
def test_what_lies_in_its_place_is_replaced_and_left_as_it_was(tmp_path: Path, what: str) -> None:
    root, other = tmp_path / "tree", tmp_path / "other"
    root.mkdir()
    other.write_text("mine")
    other.chmod(0o600)
    path = root / NAME
    make: dict[str, Callable[[], object]] = {
        "symlink": lambda: path.symlink_to(other),
        "dangling": lambda: path.symlink_to(tmp_path / "nowhere"),
        "hard link": lambda: path.hardlink_to(other),
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
    }
    make[what]()

    fd = take(root)

    assert fd is not None
    lock(other)  # nobody has locked that
    assert path.lstat().st_ino == os.fstat(fd).st_ino
    assert (other.read_text(), S_IMODE(other.stat().st_mode)) == ("mine", 0o600)
    assert not (tmp_path / "nowhere").exists()
    os.close(fd)


def test_a_lock_that_was_removed_is_held_no_more(tmp_path: Path) -> None:
    fd = take(tmp_path)
    assert fd is not None
    assert holds(tmp_path, fd)
    (tmp_path / NAME).unlink()
    assert not holds(tmp_path, fd)
    again = take(tmp_path)
    assert again is not None
    assert (holds(tmp_path, fd), holds(tmp_path, again)) == (False, True)
    os.close(fd)
    os.close(again)


def test_the_lock_lets_its_file_system_become_read_only(tmp_path: Path) -> None:
    fd = take(tmp_path)
    assert fd is not None
    assert fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    os.close(fd)
