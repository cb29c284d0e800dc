"""The witness: what it answers, what it may, and that it ends with krelay and not before."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from knet import listeners
from krelay.host.witness import ANSWER_WITHIN, Witness
from tests.tcp_relay.helpers import wait_for

HERE = Path(__file__).parents[3]


@pytest.fixture
def witness() -> Iterator[Witness]:
    witness = Witness()
    yield witness
    witness.close()


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock


def inode(sock: socket.socket) -> int:
    return os.fstat(sock.fileno()).st_ino


def test_it_answers_what_looking_oneself_finds(witness: Witness, listening: socket.socket) -> None:
    inodes = [inode(listening)]
    assert witness.holds_any(os.getpid(), inodes) is True
    assert witness.holds_any(os.getppid(), inodes) is False
    assert witness.holds_any(1 << 22, inodes) is None
    assert witness.holder(inodes) == listeners.holder(inodes)
    assert witness.holder([1]) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone sees what others have open")
def test_it_sees_what_another_user_has_open(witness: Witness) -> None:
    code = (
        "import socket, sys; s = socket.create_server(('127.0.0.1', 0)); "
        "print(s.fileno(), flush=True); sys.stdin.read()"
    )
    as_other = ("setpriv", "--reuid=61300", "--regid=61300", "--clear-groups")
    other = subprocess.Popen(
        (*as_other, "/usr/bin/python3", "-c", code),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert other.stdout is not None
        fd = int(other.stdout.readline())
        link = os.readlink(f"/proc/{other.pid}/fd/{fd}")
        found = witness.holder([int(link.removeprefix("socket:[").removesuffix("]"))])
        assert found is not None
        assert (found.pid, found.name) == (other.pid, "python3")
    finally:
        other.communicate()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has something to give up")
def test_it_may_look_and_nothing_else(witness: Witness) -> None:
    witness.holder([1])  # by then it has given up what it gives up
    lines = Path(f"/proc/{witness._pid}/status").read_text().splitlines()
    status = {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
    looking = 1 << 2 | 1 << 19  # CAP_DAC_READ_SEARCH, CAP_SYS_PTRACE
    assert [int(status[kind], 16) for kind in ("CapEff", "CapPrm", "CapBnd")] == [looking] * 3
    assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
    held = sorted(map(int, os.listdir(f"/proc/{witness._pid}/fd")))
    assert held == [0, 1, 2, 3]


def test_it_hears_no_ctrl_c_and_is_gone_after_close(witness: Witness) -> None:
    witness.holder([1])  # by then it has a session of its own
    assert os.getsid(witness._pid) != os.getsid(0)
    witness.close()
    assert not Path(f"/proc/{witness._pid}").exists()


def test_when_it_is_gone_nothing_is_known(witness: Witness, listening: socket.socket) -> None:
    os.kill(witness._pid, signal.SIGKILL)
    for _ in range(2):
        assert witness.holds_any(os.getpid(), [inode(listening)]) is None
        assert witness.holder([inode(listening)]) is None


def test_it_ends_with_a_krelay_that_is_killed() -> None:
    code = (
        "import os, signal; from krelay.host.witness import ANSWER_WITHIN, Witness; w = Witness(); "
        "print(w._pid, flush=True); signal.pause()"
    )
    parent = subprocess.Popen((sys.executable, "-c", code), cwd=HERE, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "its end")


@pytest.mark.serial
def test_one_that_is_stopped_is_waited_for_once_and_its_late_answers_are_nobodys(
    witness: Witness, listening: socket.socket
) -> None:
    mine, others = [inode(listening)], [1]
    assert witness.holds_any(os.getpid(), mine) is True
    os.kill(witness._pid, signal.SIGSTOP)
    try:
        assert witness.holds_any(os.getpid(), mine) is None
        began = time.monotonic()
        assert [witness.holds_any(os.getpid(), others) for _ in range(100)] == [None] * 100
        assert time.monotonic() - began < ANSWER_WITHIN / 2
    finally:
        os.kill(witness._pid, signal.SIGCONT)
    wait_for(lambda: witness.holds_any(os.getpid(), others) is not None, "it to go on")
    assert witness.holds_any(os.getpid(), others) is False
    assert witness.holds_any(os.getpid(), mine) is True
