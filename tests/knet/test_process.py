"""Children and their parent's death: before, while and after they ask for word of it; READY=1."""

import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest

from knet.process import tell_ready
from tests.tcp_relay.helpers import BOUND, wait_for

# A parent whose child says its pid and waits; `late` lets the child wait for the parent's death
# first.  Both write to the file that is given, because a pipe of ours wouldn't outlive the parent.
PARENT = """
import os, signal, sys, time
from knet import process

parent, (path, when) = os.getpid(), sys.argv[1:]
if os.fork() == 0:
    with open(path, "a", buffering=1) as file:
        print("pid", os.getpid(), file=file)
        if when == "late":
            while os.getppid() == parent:
                time.sleep(0.005)
        if when != "never":
            process.die_with(parent)
        print("goes on", file=file)
        time.sleep(60)
        os._exit(0)
time.sleep(60)
"""


class Family:
    """A parent and its child."""

    def __init__(self, notes: Path, when: str) -> None:
        self._notes = notes
        self.parent = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(notes), when], cwd=Path(__file__).parents[2]
        )

    def __enter__(self) -> Self:
        wait_for(lambda: any(line.startswith("pid") for line in self.notes), "the child")
        return self

    def __exit__(self, *_: object) -> None:
        self.end_parent()
        if self.child_lives():
            with suppress(ProcessLookupError):
                os.kill(self.child, signal.SIGKILL)

    @property
    def notes(self) -> list[str]:
        """What the child has said, whole lines only."""
        try:
            return self._notes.read_text().split("\n")[:-1]
        except FileNotFoundError:
            return []

    @property
    def child(self) -> int:
        return int(self.notes[0].split()[1])

    def child_lives(self) -> bool:
        """A zombie has no command line."""
        with suppress(OSError):
            return bytes(self._notes) in Path(f"/proc/{self.child}/cmdline").read_bytes()
        return False

    def end_parent(self) -> None:
        self.parent.kill()
        self.parent.wait(BOUND)


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "notes"


def test_a_child_ends_when_its_parent_is_killed(notes: Path) -> None:
    with Family(notes, "at once") as family:
        wait_for(lambda: "goes on" in family.notes, "the child's word")
        assert family.child_lives()
        family.end_parent()
        wait_for(lambda: not family.child_lives(), "the child's end")


def test_a_child_whose_parent_is_gone_already_ends_at_once(notes: Path) -> None:
    with Family(notes, "late") as family:
        family.end_parent()
        wait_for(lambda: not family.child_lives(), "the child's end")
        assert "goes on" not in family.notes


def test_without_it_a_child_would_stay(notes: Path) -> None:
    with Family(notes, "never") as family:
        wait_for(lambda: "goes on" in family.notes, "the child's word")
        family.end_parent()
        wait_for(lambda: parent_of(family.child) != family.parent.pid, "another parent")
        assert family.child_lives()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


# The service manager.


@pytest.mark.parametrize("abstract", [False, True])
def test_ready_arrives_at_a_path_and_at_an_abstract_name(
    abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"@krelay-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0") if abstract else address)
        manager.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", address)

        assert tell_ready() is None
        assert manager.recv(100) == b"READY=1"
        with pytest.raises(BlockingIOError):
            manager.recv(100)


@pytest.mark.parametrize("address", [None, "", "relative", "vsock:2:1234"])
def test_without_an_address_that_is_understood_nothing_is_sent(
    address: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setattr("socket.socket", None)

    assert tell_ready() is None


def test_a_manager_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    assert tell_ready() == "No such file or directory"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))

    assert tell_ready() == "Connection refused"


def test_a_name_that_is_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/" + "x" * 200)

    assert tell_ready() == "AF_UNIX path too long"
