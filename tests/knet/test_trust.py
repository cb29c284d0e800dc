"""Whose a tree is: who else could change it, or what leads to it, is named and the tree refused."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from knet.trust import Untrusted, user
from procfs_sim.ondisk import FileTree, check
from procfs_sim.tree import DIRECTORIES
from tests.tools.nobody import NOBODY, Nobody, as_nobody, needs_root, open_directory

OURS = user(os.geteuid())


@pytest.fixture
def parent() -> Iterator[Path]:
    """Where every user may make something of his own, as in /tmp."""
    with open_directory(0o1777) as path:
        yield path


@pytest.fixture
def root(parent: Path) -> Path:
    root = parent / "a" / "tree"
    FileTree(root).create()
    return root


def test_a_tree_of_ours_is_trusted_and_so_is_one_that_is_yet_to_come(root: Path) -> None:
    check(root)
    check(root.parent / "other" / "tree")
    (root / "timeouts" / "udp").chmod(0o666)  # a file is another matter: it is replaced
    check(root)


SHARED = {
    "the tree": (".", 0o777),
    "the tree, for its group": (".", 0o775),
    "the tree, though nobody else may rename": (".", 0o1777),
    "timeouts": ("timeouts", 0o777),
    "limits": ("limits", 0o773),
    "status": ("status", 0o1777),
    "the directory above": ("..", 0o777),
    "the directory above, for its group": ("..", 0o770),
    "two above": ("../..", 0o777),
}


@pytest.mark.parametrize(("where", "mode"), SHARED.values(), ids=SHARED)
def test_who_else_may_write_is_a_reason_to_refuse(root: Path, where: str, mode: int) -> None:
    path = Path(os.path.normpath(root / where))
    path.chmod(mode)
    message = rf"^{path} \(owner {OURS}, mode {mode:04o}\) may be written by others, .*chmod go-w"

    with pytest.raises(Untrusted, match=message) as caught:
        check(root)
    assert "\n" not in str(caught.value)
    path.chmod(0o755)
    check(root)


@needs_root
@pytest.mark.parametrize("where", [".", *DIRECTORIES, "..", "../.."])
def test_what_belongs_to_another_is_refused_with_his_name(root: Path, where: str) -> None:
    path = Path(os.path.normpath(root / where))
    os.chown(path, NOBODY, -1)

    with pytest.raises(Untrusted, match=f"^{path} belongs to nobody, .*; chown root {path}, "):
        check(root)


@needs_root
def test_a_user_without_a_name_is_named_by_his_number(root: Path) -> None:
    os.chown(root, 54321, -1)

    with pytest.raises(Untrusted, match=f"^{root} belongs to uid 54321, "):
        check(root)


@needs_root
def test_root_is_trusted_by_others_and_nobody_else_is(root: Path) -> None:
    assert as_nobody(lambda: check(root)) == "None"
    os.chown(root, 54321, -1)
    assert as_nobody(lambda: check(root)) == "Untrusted"
    os.chown(root, NOBODY, -1)
    assert as_nobody(lambda: check(root)) == "None"


@pytest.mark.parametrize("name", DIRECTORIES)
def test_a_link_in_place_of_a_directory_is_refused(root: Path, name: str) -> None:
    elsewhere = root.parent / "elsewhere"
    (root / name).rename(elsewhere)
    (root / name).symlink_to(elsewhere)

    with pytest.raises(Untrusted, match=f"^{root / name} is a symbolic link, owner {OURS}, not a "):
        check(root)


def test_links_of_ours_lead_to_it_and_what_they_lead_past_is_looked_at(root: Path) -> None:
    one, two = root.parent / "one", root.parent.parent / "two"
    one.symlink_to("../a/tree")
    two.symlink_to(one)
    check(two)
    root.chmod(0o777)
    with pytest.raises(Untrusted, match=f"^{re.escape(str(root))} "):
        check(two)
    (root.parent / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        check(root.parent / "loop" / "tree")


@needs_root
def test_a_link_that_another_has_made_is_refused(root: Path, parent: Path) -> None:
    link = parent / "link"
    with Nobody(lambda: link.symlink_to(root)):
        pass

    with pytest.raises(Untrusted, match=f"^{link} belongs to nobody"):
        check(link)


@needs_root
def test_nothing_is_made_in_what_is_refused(parent: Path) -> None:
    theirs = parent / "theirs"
    with Nobody(theirs.mkdir):
        pass
    for root in (theirs, theirs / "tree", theirs / "more" / "tree"):
        with pytest.raises(Untrusted, match=f"^{theirs} belongs to nobody"):
            FileTree(root).create()
    assert list(theirs.iterdir()) == []


@needs_root
def test_a_directory_that_another_makes_meanwhile_gets_no_files(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = parent / "tree"
    real: Callable[..., None] = Path.mkdir

    def mkdir(path: Path, *given: int, **named: bool) -> None:
        if path == root:
            with Nobody(lambda: os.mkdir(root)):
                pass
        real(path, *given, **named)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(Untrusted, match=f"^{root} belongs to nobody"):
        FileTree(root).create()
    assert [path for path in root.rglob("*") if path.is_file()] == []
