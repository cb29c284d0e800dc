"""Removing what was left: only what is ours, and never below a krelay that is at work."""

import os
import socket
from pathlib import Path

import pytest

from krelay.host import treelock
from krelay.host.cleanup import SOCKETS, StillServed, clean, remove_tree
from procfs_sim.ondisk import FileTree
from procfs_sim.tree import STATUS


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """All that a killed krelay leaves on the disk."""
    root = tmp_path / "tree"
    FileTree(root).create()
    for name in STATUS:
        (root / name).write_text("")
    for name in SOCKETS:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(root / name))
    return root


def test_a_tree_with_nothing_but_ours_goes(tree: Path) -> None:
    assert remove_tree(tree) == []
    assert list(tree.parent.iterdir()) == []


def test_what_is_not_ours_stays_and_is_named(tree: Path) -> None:
    (tree / "notes").write_text("mine")
    (tree / "timeouts" / "backup").write_text("mine")

    assert remove_tree(tree) == ["notes", "timeouts"]
    left = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    assert left == ["notes", "timeouts", "timeouts/backup"]
    assert (tree / "notes").read_text() == "mine"


def test_what_bears_our_names_but_is_of_another_kind_stays(tree: Path) -> None:
    (tree / "gport").unlink()
    (tree / "gport").mkdir()
    (tree / "gport" / "mine").write_text("")
    for path in (tree / "limits").iterdir():
        path.unlink()
    (tree / "limits").rmdir()
    (tree / "limits").write_text("a file")

    assert remove_tree(tree) == ["gport", "limits"]


def test_a_link_is_removed_and_not_followed(tree: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (tree / "real_ip").unlink()
    (tree / "real_ip").symlink_to(elsewhere)

    assert remove_tree(tree) == []
    assert elsewhere.read_text() == "mine"


def test_removing_again_finds_nothing(tree: Path) -> None:
    remove_tree(tree)

    assert remove_tree(tree) == []


def test_below_a_krelay_at_work_nothing_is_removed(tree: Path) -> None:
    lock = treelock.take(tree)
    assert lock is not None
    before = sorted(tree.rglob("*"))
    with pytest.raises(StillServed, match=f"a krelay serves {tree}; stop it with SIGTERM instead"):
        clean(tree)
    os.close(lock)

    assert sorted(tree.rglob("*")) == before


def test_the_tree_and_the_rules_are_named_when_they_go(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = ["krelay-other"]

    class Backend:
        name = "nft"
        present = staticmethod(rules.__contains__)
        remove = staticmethod(rules.remove)

    monkeypatch.setattr("krelay.host.netfilter.CANDIDATES", [Backend])
    monkeypatch.setattr("krelay.host.netfilter.instance_name", lambda *_: "krelay-ours")
    rules.append("krelay-ours")
    (tree / "notes").touch()
    assert clean(tree) == ["rules of krelay-ours (nft)", f"file tree {tree}, but not notes"]
    (tree / "notes").unlink()
    assert clean(tree) == [f"file tree {tree}"]
    assert clean(tree) == []
    assert rules == ["krelay-other"]
