"""`krelay clean`: removes what a killed krelay left: its rules, its sockets, its file tree."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from knet.roles import ADMIN, RELAY, VIEW
from knet.rules.run import RulesUnavailable
from krelay.host import attachment, netfilter, reserve, treelock
from procfs_sim import ondisk
from procfs_sim.tree import DIRECTORIES, SETTINGS, STATUS

SOCKETS = (ADMIN.socket, VIEW.socket, RELAY.socket)


class StillServed(Exception):
    """A krelay is at work there: nothing was removed."""


def clean(root: Path, *, keep_settings: bool = False) -> list[str]:
    """What was removed, a line each; `keep_settings`: rules and sockets alone.

    Raises StillServed, RulesUnavailable; trust.Untrusted if others can change the tree, of which
    nothing is removed then, nor of anything else.
    """
    ondisk.check(root)
    with _held(root):
        return _clean(root, keep_settings=keep_settings)


@contextmanager
def _held(root: Path) -> Iterator[None]:
    """No krelay begins to serve the tree meanwhile.  Raises StillServed."""
    try:
        lock = treelock.take(root)
    except (FileNotFoundError, NotADirectoryError):
        yield
        return
    if lock is None:
        raise StillServed(f"a krelay serves {root}; stop it with SIGTERM instead")
    try:
        yield
    finally:
        os.close(lock)


def _clean(root: Path, *, keep_settings: bool) -> list[str]:
    removed = []
    name = netfilter.instance(root)
    for backend in netfilter.places(name):
        if backend.present(name):
            backend.remove(name)
            removed.append(f"rules of {name} ({backend.name})")
    for link in attachment.detach(name):
        removed.append(f"programs of {name} on {link}")
    if keep_settings:
        for path in (root / name for name in SOCKETS):
            with suppress(FileNotFoundError, NotADirectoryError):
                path.unlink()
                removed.append(f"socket {path}")
    elif root.is_dir():
        left = remove_tree(root)
        removed.append(f"file tree {root}" + (f", but not {', '.join(left)}" if left else ""))
    return removed


def remove_tree(root: Path) -> list[str]:
    """Removes our files below `root`, and the directories if they are empty then.

    The names of what isn't ours and so stays.
    """
    for name in (*SETTINGS, *STATUS, *SOCKETS, treelock.NAME, reserve.NAME):
        with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
            (root / name).unlink()
    for directory in (*(root / name for name in DIRECTORIES), root):
        with suppress(OSError):
            directory.rmdir()
    return sorted(entry.name for entry in root.iterdir()) if root.is_dir() else []


__all__ = ["RulesUnavailable", "StillServed", "clean", "remove_tree"]
