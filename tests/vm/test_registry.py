"""Which labs are there: records, their owners, the lock."""

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from krelay_vm import registry
from krelay_vm.registry import Owner, Record


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "DIRECTORY", tmp_path / "labs")
    return tmp_path / "labs"


def record(name: str = "lab", owner: Owner | None = None) -> Record:
    return Record(name, ("a", "b"), (f"{name}-a", f"{name}-b"), f"/tmp/{name}", owner)


def test_a_claimed_name_is_taken_until_it_is_released() -> None:
    with registry.locked():
        assert registry.claim(record())
        assert not registry.claim(record())
        assert registry.records() == [record()]
        registry.release("lab")
        assert registry.claim(record())


def test_the_directory_goes_with_the_last_record(directory: Path) -> None:
    with registry.locked():
        registry.claim(record())
    assert directory.exists()
    with registry.locked():
        registry.release("lab")
    assert not directory.exists()


def test_a_record_is_read_as_it_was_written() -> None:
    mine = record("mine", Owner.me())
    with registry.locked():
        registry.claim(mine)

    assert registry.records() == [mine]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"hosts": 1}', "\0"])
def test_a_file_that_is_no_record_is_passed_over(directory: Path, text: str) -> None:
    directory.mkdir()
    (directory / "odd.json").write_text(text)

    assert registry.records() == []


def test_a_record_is_stale_when_its_owner_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = registry._started(process.pid)
        assert started is not None
        owner = Owner(process.pid, started)
        assert owner.alive
        assert not record(owner=owner).stale
    finally:
        process.kill()
        process.communicate()
    assert not owner.alive
    assert record(owner=owner).stale


def test_a_zombie_owns_nothing() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    assert registry._started(process.pid) is None
    process.wait()


def test_a_pid_that_was_used_again_is_not_the_owner() -> None:
    me = Owner.me()

    assert me.alive
    assert not Owner(me.pid, me.started - 1).alive


def test_a_lab_that_stays_is_never_stale() -> None:
    assert not record().stale


def test_the_lock_keeps_others_out_even_while_the_directory_comes_and_goes(directory: Path) -> None:
    inside = 0
    most = []

    def visit() -> None:
        nonlocal inside
        for _ in range(50):
            with registry.locked():
                inside += 1
                most.append(inside)
                assert directory.exists()
                os.sched_yield()
                inside -= 1

    threads = [threading.Thread(target=visit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(most) == 200
    assert max(most) == 1


LOCKS = """
import fcntl, os, sys
os.setuid(65534)
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("before", [None, 0o755, 0o777])
def test_no_other_user_can_hold_the_lock(
    before: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as open_to_all:
        os.chmod(open_to_all, 0o755)
        directory = Path(open_to_all) / "labs"
        monkeypatch.setattr(registry, "DIRECTORY", directory)
        if before is not None:
            directory.mkdir()
            directory.chmod(before)
        with registry.locked():
            registry.claim(record())
        other = subprocess.run(
            [sys.executable, "-c", LOCKS, str(directory)], capture_output=True, text=True
        )

        assert other.returncode == 1
        assert "PermissionError" in other.stderr
        assert registry.records() == [record()]


def test_an_error_under_the_lock_comes_out_and_frees_it(directory: Path) -> None:
    with pytest.raises(FileNotFoundError), registry.locked():
        raise FileNotFoundError

    assert not directory.exists()
    with registry.locked():
        assert directory.exists()
