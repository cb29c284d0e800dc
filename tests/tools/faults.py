"""System calls of a process that runs: which it makes, and then each of them made to fail once.

    calls = recorded(pid, stimulus)            # the table: made by what the process really does
    with broken(pid, calls[0], "EMFILE") as broke:
        stimulus()
    assert broke()                             # and the process lives

strace does both (its `inject`, strace(1)), so nothing in the process is made for it, and calls made
in C are among them.  One thread is traced, the one whose id is given; what it starts isn't.
Attaching breaks off the call that sleeps (epoll_wait: EINTR), and a traced process is slower.

A call that is made to fail isn't made at all: a descriptor whose `close` fails stays open here, as
it wouldn't by a real error.
"""

import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ERRORS = ("EMFILE", "ENFILE", "ENOSPC", "EROFS", "EIO", "ENOMEM", "EPERM", "ENOBUFS")

SPARED = frozenset(
    {"mmap", "munmap", "mremap", "mprotect", "madvise", "brk", "futex", "exit", "exit_group"}
    | {"restart_syscall", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn"}
)
"""Calls that aren't made to fail: the interpreter's memory, locks, signals and end."""

SETTLE = 0.05
"""Seconds of sleep after which the process is done with a stimulus."""
SETTLED_WITHIN = 1.0
"""Seconds after which it is, even if it never sleeps for so long."""
PATIENCE = 30.0

_LINE = re.compile(r"^(\w+)\((.*)")
_DESCRIPTOR = re.compile(r"(?:^|[ \[{=])\d+<((?:[^<>]|->)+)>")
_PATH = re.compile(r'"([^"]*)"')
_INJECTED = re.compile(r"^(\w+)\((.*) = -1 E\w+ .*\(INJECTED\)$")


class Call(NamedTuple):
    """A call that a stimulus brings about: the `nth` (from 1) of that name, and what it is on.

    `on` is a file's path, or the kind of a socket; numbers that differ each time are left out.
    """

    name: str
    on: str
    nth: int

    def __str__(self) -> str:
        return f"{self.name}({self.on})"


def why_not() -> str | None:
    """Why no call can be made to fail here; None if that is possible."""
    strace = shutil.which("strace")
    if strace is None:
        return "strace isn't installed"
    try:
        done = subprocess.run(
            [strace, "-o", "/dev/null", "-e", "inject=getppid:error=EIO", "true"],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return f"strace can't trace here: {done.stderr.strip()}" if done.returncode else None


def recorded(pid: int, stimulus: Callable[[], object]) -> list[Call]:
    """The calls that this thread makes meanwhile, each that differs by name and `on` once."""
    with _traced(pid) as lines:
        stimulus()
        _settle(pid)
    counts: Counter[str] = Counter()
    found: dict[tuple[str, str], Call] = {}
    for line in lines:
        if (match := _LINE.match(line)) and match[1] not in SPARED and "(detached" not in line:
            name, on = match[1], _on(match[2])
            counts[name] += 1
            found.setdefault((name, on), Call(name, on, counts[name]))
    return list(found.values())


@contextmanager
def broken(pid: int, call: Call, error: str) -> Iterator[Callable[[], Call | None]]:
    """Meanwhile the `nth` call of that name fails with `error`, once.

    What is given tells, after the end, which call it hit; None: there weren't so many.
    """
    inject = f"inject={call.name}:error={error}:when={call.nth}"
    lines: list[str] = []

    def broke() -> Call | None:
        for line in lines:
            if match := _INJECTED.match(line):
                return Call(match[1], _on(match[2]), call.nth)
        return None

    with _traced(pid, "-e", f"trace={call.name}", "-e", inject) as written:
        yield broke
        _settle(pid)
    lines += written


def _settle(pid: int) -> None:
    """Until the process sleeps; on a busy machine it may only now get to what was asked of it."""
    give_up = time.monotonic() + SETTLED_WITHIN
    before = None
    while (now := _sleep(pid)) is None or now != before:
        if time.monotonic() > give_up:
            return
        before = now
        time.sleep(SETTLE)


def _sleep(pid: int) -> str | None:
    """Which of its sleeps the process is in, by their count; None: in none."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""
    sleeps = status.partition("\nState:\t")[2].startswith("S")
    return status.partition("\nvoluntary_ctxt_switches:")[2].split()[0] if sleeps else None


@contextmanager
def _traced(pid: int, *options: str) -> Iterator[list[str]]:
    """strace on this thread; its lines, after the end."""
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as directory:
        calls, said = Path(directory, "calls"), Path(directory, "said")
        command = ["strace", "-yy", "-s", "128", "-o", str(calls), *options, "-p", str(pid)]
        with said.open("wb") as out:
            tracer = subprocess.Popen(command, stdout=out, stderr=out)
        try:
            give_up = time.monotonic() + PATIENCE
            while "attached" not in said.read_text():
                assert tracer.poll() is None, said.read_text()
                assert time.monotonic() < give_up, "strace doesn't attach"
                time.sleep(0.002)
            yield lines
        finally:
            tracer.send_signal(signal.SIGINT)  # it detaches
            tracer.wait(PATIENCE)
        lines += calls.read_text(errors="replace").splitlines()


def _on(arguments: str) -> str:
    """What a call is on, of its arguments as strace shows them.

    >>> _on('12<NETLINK:[ROUTE:4711]>, {msg_name=NULL}, 0) = 20')
    'NETLINK:[ROUTE]'
    >>> _on('AT_FDCWD</home>, "/tmp/x81/status/.state.new", O_WRONLY) = 3')
    'status/.state.new'
    >>> _on('4<anon_inode:[eventpoll]>, EPOLL_CTL_ADD, 9<UNIX-STREAM:[12->13, "/k/a.sock"]>) = 0')
    'EPOLL_CTL_ADD UNIX-STREAM'
    """
    arguments = arguments.removeprefix("AT_FDCWD").partition(") = ")[0]
    operation = ""
    if match := re.search(r"EPOLL_CTL_\w+", arguments):
        operation, arguments = match[0] + " ", arguments[match.end() :]
    if match := _DESCRIPTOR.search(arguments):
        on = match[1]
        if on.startswith("/"):
            return operation + _short(on)
        return operation + re.sub(r":\[[\d-].*|(?<=\w):\d+(?=\])", "", on)
    return operation + (_short(match[1]) if (match := _PATH.search(arguments)) else "")


def _short(path: str) -> str:
    return re.sub(r"\d+", "N", "/".join(path.split("/")[-2:]))
