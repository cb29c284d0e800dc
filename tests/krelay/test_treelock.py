"""The lock on a tree: one at a time, and for no longer than its process lives."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from krelay.treelock import is_served, take


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
        "import sys; from pathlib import Path; from krelay.treelock import take\n"
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
