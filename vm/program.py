"""Programs in a host: how one is run or started, and what became of it.

They run in sessions of their own: a Ctrl-C at the terminal reaches only us, and a program ends
together with its children.  They are started by nsenter and setpriv, which exec, so that their pid
is the program's: no code runs between fork and exec, which with threads about would be unsafe.
They write to a file, not to a pipe: nobody has to read along.
"""

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from krelay_vm.errors import LabError, LabTimeout
from krelay_vm.machine import Job, Machine

GRACE = 2.0
"""Seconds that programs have to end by themselves after SIGTERM."""
POPEN: type[subprocess.Popen[bytes]] = subprocess.Popen
"""What makes a process of a command line."""
_UNLESS_ORPHANED = ("sh", "-c", '[ $PPID = "$1" ] && shift && exec "$@"', "sh")
"""Who is killed before PR_SET_PDEATHSIG is set leaves a child that nothing will end (prctl(2))."""


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a command; a negative `status` is the signal that ended it."""

    status: int
    stdout: str
    stderr: str
    seconds: float


class Process(Protocol):
    """What runs a program: a process of ours, or a job of a machine."""

    @property
    def pid(self) -> int: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float) -> int: ...

    def signal(self, number: int) -> None: ...


class Local:
    """A process that leads a session of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.pid = process.pid
        self.poll = process.poll
        self.wait = process.wait

    def signal(self, number: int) -> None:
        # It is unreaped as long as poll() says None, so nobody else can have its pid.
        if self.poll() is None:
            os.killpg(self.pid, number)


class Program:
    """A program that runs in a host.  Its standard output and error go to the file `log`."""

    def __init__(self, host: str, argv: tuple[str, ...], log: Path, process: Process) -> None:
        self.host = host
        self.argv = argv
        self.log = log
        self.pid = process.pid
        self._process = process

    def __str__(self) -> str:
        return f"{self.host}: {' '.join(self.argv)}"

    @property
    def output(self) -> str:
        """What it has written so far."""
        return self.log.read_text(errors="replace")

    def poll(self) -> int | None:
        """Its exit status, or None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float = 10.0) -> int:
        """Waits for its end and returns the exit status.  Raises LabTimeout."""
        try:
            return self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise LabTimeout(f"{self} did not end within {timeout:g} s") from None

    def signal(self, number: int) -> None:
        """Sends a signal to it and to the children in its process group, unless it has ended."""
        self._process.signal(number)

    def terminate(self) -> None:
        """Sends SIGTERM."""
        self.signal(signal.SIGTERM)

    def kill(self) -> None:
        """Sends SIGKILL."""
        self.signal(signal.SIGKILL)


def mortal(argv: Sequence[str]) -> tuple[str, ...]:
    """The command line that runs `argv`, as the same process, for as long as this thread lives."""
    owner = str(os.getpid())
    return ("setpriv", "--pdeathsig", "KILL", "--", *_UNLESS_ORPHANED, owner, *argv)


def run_here(
    command: Sequence[str],
    what: str,
    input: bytes | None,
    timeout: float,
    env: Mapping[str, str] | None,
) -> Result:
    """Runs a command of this kernel's, called `what`, and waits until its output is closed.

    Raises LabTimeout, the command being killed.
    """
    began = time.monotonic()
    with POPEN(
        command,
        stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(env),
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(input, timeout)
        except BaseException as error:
            # The group, not the process: a child may hold the pipes, and it is what hangs.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            took = f"{what} took longer than {timeout:g} s"
            raise LabTimeout(took + tail(_text(error.output) + _text(error.stderr))) from None
    return Result(process.returncode, _text(out), _text(err), time.monotonic() - began)


def start_here(command: Sequence[str], log: Path, env: Mapping[str, str] | None) -> Local:
    """Starts a command of this kernel's, whose output is appended to `log`."""
    with log.open("ab") as output:
        process = POPEN(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=_environment(env),
            start_new_session=True,
        )
    return Local(process)


def end_all(programs: Sequence[Program]) -> None:
    """Asks all of them to end, and after GRACE doesn't ask any more."""
    for program in programs:
        program.terminate()
    deadline = time.monotonic() + GRACE
    for program in programs:
        with suppress(LabTimeout):
            program.wait(max(0.0, deadline - time.monotonic()))
    for program in programs:
        program.kill()
        program.wait()


def obituaries(programs: Sequence[Program]) -> str:
    """What those said that have ended, to be added to a message."""
    ended = [program for program in programs if program.poll() is not None]
    return "".join(
        f"\n{program} has ended with status {program.poll()}{tail(program.output)}"
        for program in ended
    )


def run_job(
    machine: Machine,
    argv: Sequence[str],
    input: bytes | None,
    timeout: float,
    env: Mapping[str, str] | None = None,
) -> Result:
    """Runs a command in a machine and waits for its end.  Raises LabError if the machine ends."""
    if not argv:
        raise LabError("no command given")
    began = time.monotonic()
    job = machine.submit(argv, input, env=env)
    try:
        status = job.wait(timeout)
    except subprocess.TimeoutExpired:
        took = f"{machine.host}: {' '.join(argv)} took longer than {timeout:g} s"
        raise LabTimeout(took + tail(_said(job)) + machine.last_lines()) from None
    finally:
        job.signal(signal.SIGKILL)
    out, err = ((job.folder / name) for name in ("out", "err"))
    if status < 0 and not machine.alive:
        raise LabError(f"the machine {machine.host} has ended{machine.last_lines()}")
    result = Result(status, _text(_bytes(out)), _text(_bytes(err)), time.monotonic() - began)
    job.remove()
    return result


def _said(job: Job) -> str:
    return "".join(_text(_bytes(job.folder / name)) for name in ("out", "err"))


def _bytes(path: Path) -> bytes:
    """What is in a file that may not be there."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, **(extra or {})}


def _text(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")


def tail(output: str, lines: int = 10) -> str:
    """The last lines, indented below a message."""
    return "".join(f"\n    {line}" for line in output.splitlines()[-lines:])
