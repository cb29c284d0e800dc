"""Whether a file tree is for its owner alone to change, so that others can't steer the daemon that
serves it.

The rule is that of sshd's StrictModes (sshd_config(5)), for the tree and for the whole way to it:
every directory belongs to root or to our own user, and nobody else may write to it.  A directory
with the sticky bit, as /tmp, may be anybody's to write: what is ours in it nobody else can rename.
A symbolic link on the way leads where its owner wants, so it must be root's or ours as well; none
may stand in place of the tree's own directories.
"""

import errno
import os
import pwd
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from shlex import quote

MAX_LINKS = 40
"""Symbolic links on the way to a file (path_resolution(7))."""

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class Untrusted(OSError):
    """Others can change the tree.  Its text is one line: the path, its owner, and what to do."""

    def __init__(self, path: Path, what: str, command: str) -> None:
        fix = f"{command} {quote(str(path))}"
        super().__init__(errno.EPERM, f"{what}; {fix}, or choose another tree with --root", path)
        self.what = f"{path} {what}"
        """What is wrong."""
        self.fix = fix
        """The command that puts it right, as it is typed in a shell."""

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"


def in_words(error: OSError) -> str:
    """What people are told of an error of a tree."""
    return str(error) if isinstance(error, Untrusted) else str(error.strerror)


def check(root: Path, folders: Iterable[str] = ()) -> None:
    """Raises Untrusted if others than root and our own user can change what lies at `root`.

    That is it, what leads to it, and these folders in it.

    What isn't there yet is fine, if only root or we can make it.  Raises other OSErrors if that
    can't be found out.
    """
    top = Path("/").lstat()
    # A user namespace shows all whom it doesn't know as one, root among them (user_namespaces(7)).
    above = {0, os.geteuid(), top.st_uid}
    for path, found in _way(root.absolute()):
        _check(path, found, above)
    for name in ("", *folders):
        path = root / name
        try:
            found = path.stat() if not name else path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if name and stat.S_ISLNK(found.st_mode):
            owner = user(found.st_uid)
            raise Untrusted(path, f"is a symbolic link, owner {owner}, not a directory", "rm")
        _check(path, found, {0, os.geteuid()}, sticky=False)


def user(uid: int) -> str:
    """The name of a user, or `uid 1234` if it has none."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _check(path: Path, found: os.stat_result, owners: set[int], *, sticky: bool = True) -> None:
    if found.st_uid not in owners:
        raise Untrusted(
            path,
            f"belongs to {user(found.st_uid)}, who could change the file tree",
            f"chown {user(os.geteuid())}",
        )
    shared = found.st_mode & _OTHERS_WRITE and not (sticky and found.st_mode & stat.S_ISVTX)
    if shared and stat.S_ISDIR(found.st_mode):
        who, mode = user(found.st_uid), stat.S_IMODE(found.st_mode)
        what = f"(owner {who}, mode {mode:04o}) may be written by others, who could change the tree"
        raise Untrusted(path, what, "chmod go-w")


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """All that is passed on the way to an absolute path: directories, symbolic links, and itself.

    It ends early where nothing is.  Raises OSError.
    """
    here = Path("/")
    yield here, here.lstat()
    ahead = [part for part in reversed(path.parts) if part != "/"]
    links = 0
    while ahead:
        part = ahead.pop()
        if part == "..":
            here = here.parent
            continue
        step = here / part
        try:
            found = step.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return
        yield step, found
        if not stat.S_ISLNK(found.st_mode):
            here = step
            continue
        links += 1
        if links > MAX_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
        target = step.readlink()
        if target.is_absolute():
            here = Path("/")
        ahead += [part for part in reversed(target.parts) if part != "/"]
