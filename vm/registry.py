"""Which labs are on this machine: a file each in /run/krelay-lab, written before the lab is built.

A lab that was killed can't clean up behind itself, so what it made must be known elsewhere.  Its
file names everything, and its owner by pid *and* start time, because pids are used again.  A record
without an owner is a lab that is meant to stay. Files appear complete (rename), and claims are made
under a lock on the directory itself: nothing is left to clean but the files, and the directory goes
with the last of them.  It is open to its owner alone: who can open it could lock it (flock(2)).
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

DIRECTORY = Path("/run/krelay-lab")


class Owner(NamedTuple):
    """A process, unmistakably: its pid and when it started, in the kernel's ticks since boot."""

    pid: int
    started: int

    @property
    def alive(self) -> bool:
        """Whether that very process is running."""
        return _started(self.pid) == self.started

    @classmethod
    def me(cls) -> "Owner":
        """This process."""
        owner = cls.of(os.getpid())
        assert owner is not None
        return owner

    @classmethod
    def of(cls, pid: int) -> "Owner | None":
        """The process that has this pid now."""
        started = _started(pid)
        return None if started is None else cls(pid, started)


class Record(NamedTuple):
    """A lab: what must go when it goes."""

    name: str
    hosts: tuple[str, ...]
    namespaces: tuple[str, ...]
    directory: str
    owner: Owner | None  # None: it stays until it is taken down
    machines: tuple[tuple[str, str], ...] = ()
    """The hosts that are virtual machines, each with its backend."""

    @property
    def stale(self) -> bool:
        """Whether its owner is gone without having removed it."""
        return self.owner is not None and not self.owner.alive


def _started(pid: int) -> int | None:
    """When a process started (field 22 of /proc/PID/stat, proc(5)); None if it is gone."""
    try:
        # The second field, the name, may itself hold blanks and brackets: count from its end.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


@contextmanager
def locked() -> Iterator[None]:
    """Nobody else claims or releases meanwhile; the directory exists inside, not always after."""
    while (lock := _lock()) is None:
        pass
    try:
        yield
    finally:
        with suppress(OSError):
            DIRECTORY.rmdir()  # refused unless it is empty
        os.close(lock)


def _lock() -> int | None:
    """The directory, open and locked; None if it went away under our hands."""
    with suppress(FileExistsError):
        os.mkdir(DIRECTORY, 0o700)
    try:
        lock = os.open(DIRECTORY, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        os.fchmod(lock, 0o700)  # it may be there from a version that let others in
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever held it before us may have removed it: then it is nobody's directory any more.
        if os.path.samestat(os.fstat(lock), os.stat(DIRECTORY)):
            return lock
    except FileNotFoundError:
        pass
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    return None


def claim(record: Record) -> bool:
    """Writes the record; False if the name is taken.  Call it `locked`."""
    path = _path(record.name)
    if path.exists():
        return False
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(record._asdict()) + "\n")
    fresh.rename(path)
    return True


def release(name: str) -> None:
    """Forgets a lab; call it `locked`."""
    _path(name).unlink(missing_ok=True)


def records() -> list[Record]:
    """All labs, by name.  A file that is no record is passed over."""
    return [record for path in sorted(DIRECTORY.glob("*.json")) if (record := _read(path))]


def _path(name: str) -> Path:
    return DIRECTORY / f"{name}.json"


def _read(path: Path) -> Record | None:
    try:
        tree = json.loads(path.read_text())
        return Record(
            name=path.stem,
            hosts=tuple(map(str, tree["hosts"])),
            namespaces=tuple(map(str, tree["namespaces"])),
            directory=str(tree["directory"]),
            owner=Owner(*map(int, tree["owner"])) if tree["owner"] else None,
            machines=tuple((str(host), str(backend)) for host, backend in tree.get("machines", ())),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
