"""A virtual machine that runs: how it begins and ends, and how commands get into it and out again.

The machine runs in its host's network namespace, where the wire ends and its tap devices are; so
whatever ends the processes of a namespace ends it.  Its serial line is a named pipe in and a file
out: no process has to sit at the other end, several may use it at once, and it outlives the process
that started it.  A request is one short line, which a pipe takes whole (pipe(7)); everything else
passes through files (`krelay_vm.guest`).

Waiting is asking again: the file that is waited for, and each time whether the machine lives.

User-Mode Linux has no room for the registers of every processor (vm/xstate.c).  Where its first
program is therefore killed, it is started again with what fixes that, and so is each that this
process starts later.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import ClassVar, TypeVar

from krelay_vm import guest, kernels, kmod, netns
from krelay_vm.errors import LabError, LabTimeout
from krelay_vm.guest import Streams
from krelay_vm.registry import Owner
from krelay_vm.topology import Topology

T = TypeVar("T")

BOOT = 60.0
"""Seconds for a machine to come up; it takes two or six on an idle machine."""

_PASSED_ON = ("PATH", "PYTHONPATH", "LANG", "LC_ALL")
_THERE = {"HOME": "/run", "TMPDIR": "/run", "TERM": "linux", "PYTHONDONTWRITEBYTECODE": "1"}


class Machine:
    """A machine of a lab, by its folder `vm/HOST` in the lab's directory; it may not run."""

    whole_registers: ClassVar = False
    """Whether it is known that here a User-Mode Linux must be helped with the registers."""

    def __init__(self, host: str, share: Path) -> None:
        self.host = host
        self.share = share
        self.folder = share / "vm" / host
        self._process: subprocess.Popen[bytes] | None = None
        self._identity: Owner | None = None
        self._backend = ""

    def boot(
        self,
        topology: Topology,
        backend: str,
        namespace: str,
        wrapped: Callable[[Sequence[str]], Sequence[str]],
    ) -> None:
        """Starts it, and doesn't wait.  `wrapped` may put a command in front of its own."""
        self._backend = backend
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for stale in ("up", "uml", "pid", "shell.sock"):
            path = self.folder / stale
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        (self.folder / "jobs").mkdir(exist_ok=True)
        line = self.folder / "console.in"
        line.unlink(missing_ok=True)  # with what nobody read
        os.mkfifo(line, 0o600)
        with ExitStack() as held:
            # Open for both: so there is always a writer, and the machine never reads an end.
            console = os.open(line, os.O_RDWR)
            held.callback(os.close, console)
            terminal = os.openpty()
            for end in terminal:
                held.callback(os.close, end)
            argv = self._prepared(topology, backend, terminal[0])
            if backend == "uml":
                (self.folder / "shell.tty").write_text(os.ttyname(terminal[1]))
            log = held.enter_context((self.folder / "console.log").open("wb"))
            # A kernel that panics would leave its memory in a file.
            command = ("prlimit", "--core=0", "--", *argv)
            self._process = subprocess.Popen(
                netns.command(namespace, *wrapped(command)),
                stdin=console,
                stdout=log,
                stderr=log,
                # The slave as well: a terminal that nobody holds open has hung up.
                pass_fds=terminal,
                start_new_session=True,
            )
        self._identity = Owner.of(self._process.pid)
        if self._identity:
            (self.folder / "pid").write_text(" ".join(map(str, self._identity)))

    def _prepared(self, topology: Topology, backend: str, shell: int) -> tuple[str, ...]:
        """Writes its first program; returns its command line."""
        kernel = kernels.kernel(backend)
        wanted = list(kmod.RELAY[backend]) if topology.host(self.host).forwards else []
        if any(a.version == 6 for e in topology.interfaces(self.host) for a in e.addresses):
            wanted += kmod.IPV6[backend]
        share, folder = str(self.share), str(self.folder)
        first = self.folder / "init"
        first.write_text(
            guest.init(
                topology, self.host, backend, share, folder, kernels.module_files(kernel, wanted)
            )
        )
        first.chmod(0o755)
        if backend == "uml":
            command = guest.uml_command(kernel.image, topology, self.host, folder, shell)
            if not self.whole_registers:
                return command
            return ("env", f"LD_PRELOAD={kernels.whole_registers(self.folder)}", *command)
        return guest.qemu_command(
            kernel.image, kernel.initramfs, topology, self.host, share, folder
        )

    def wait_up(self, timeout: float = BOOT) -> None:
        """Waits until it takes commands.

        Raises Unsuited if the first program of a User-Mode Linux was killed, LabError if it ends
        otherwise before, and LabTimeout.
        """
        up = (self.folder / "up").exists
        try:
            self.until(lambda: up() or self._killed_by(), "up", timeout)
        except LabError:
            if not self._killed_by():
                raise
        if not up() and (number := self._killed_by()):
            raise Unsuited(number)

    def _killed_by(self) -> int | None:
        """The signal that has killed the first program of a User-Mode Linux."""
        return guest.killed_by(self._console()) if self._backend == "uml" else None

    @property
    def identity(self) -> Owner | None:
        """The process that it is, if it was started; whether by us or by another process."""
        if self._identity is None:
            with suppress(OSError, ValueError, TypeError):
                self._identity = Owner(*map(int, (self.folder / "pid").read_text().split()))
        return self._identity

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.identity is not None and self.identity.alive

    def kill(self) -> None:
        """Ends it at once, as a cut of the power does."""
        identity = self.identity
        if identity and identity.alive:
            # It leads a session of its own, and a User-Mode Linux has children.
            with suppress(ProcessLookupError):
                os.killpg(identity.pid, signal.SIGKILL)
        if self._process:
            self._process.wait()

    def until(self, condition: Callable[[], T | None], what: str, timeout: float) -> T:
        """Waits for a condition.  Raises LabTimeout, and LabError as soon as the machine ends."""
        deadline = time.monotonic() + timeout
        pause = 0.002
        while not (found := condition()):
            if not self.alive:
                if found := condition():  # its last act
                    return found
                raise LabError(f"the machine {self.host} has ended{self.last_lines()}")
            if time.monotonic() > deadline:
                late = f"{self.host} {what}: not within {timeout:g} s"
                raise LabTimeout(late + self.last_lines())
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        return found

    def last_lines(self, lines: int = 10) -> str:
        """What the console showed last, indented below a message; nothing after a kernel's panic.

        What the kernel shows of itself then would push out why it came to that.
        """
        shown = [line.rstrip() for line in self._console().splitlines() if line.strip()]
        panics = [number for number, line in enumerate(shown) if "Kernel panic" in line]
        shown = shown[: panics[0] + 1 if panics else None][-lines:]
        if not shown:
            return "; its console is empty"
        return "; its console's last lines:" + "".join(f"\n    {line}" for line in shown)

    def _console(self) -> str:
        """What the console has shown since it was started."""
        try:
            return (self.folder / "console.log").read_text(errors="replace")
        except OSError:
            return ""

    def submit(
        self,
        argv: Sequence[str],
        input: bytes | None = None,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> "Job":
        """Starts a command, its output in `log`, or else in the job's files `out` and `err`.

        Raises LabError if the machine doesn't run.
        """
        if not self.alive:
            raise LabError(f"the machine {self.host} does not run{self.last_lines()}")
        folder = Path(tempfile.mkdtemp(prefix="", dir=self.folder / "jobs"))
        names = ("out", "err") if log is None else (log, log)
        out, err = (str(folder / name) for name in names)
        if input is not None:
            (folder / "in").write_bytes(input)
        source = "/dev/null" if input is None else str(folder / "in")
        passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        text = guest.job(
            argv, Streams(source, out, err), os.getcwd(), passed_on | _THERE | dict(env or {})
        )
        (folder / "run").write_bytes(os.fsencode(text))
        job = Job(self, folder)
        self.request(f"run {folder.name}")
        return job

    def request(self, line: str) -> None:
        """Writes a line to the machine.  Raises LabError if nobody is there to read it."""
        try:
            console = os.open(self.folder / "console.in", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            raise LabError(f"the machine {self.host} has ended{self.last_lines()}") from None
        try:
            os.write(console, line.encode() + b"\n")
        except BlockingIOError:
            raise LabError(f"the machine {self.host} takes no commands any more") from None
        finally:
            os.close(console)


class Unsuited(LabError):
    """User-Mode Linux can't run programs on this machine: the first was killed by that signal."""

    def __init__(self, number: int) -> None:
        super().__init__(
            f"User-Mode Linux does not run on this machine: its first program is killed by signal "
            f"{number}, as on processors with AMX; QEMU works: {kernels.INSTEAD}"
        )
        self.number = number


def boot_all(
    machines: Sequence[Machine],
    topology: Topology,
    backends: Mapping[str, str],
    namespace: Callable[[str], str],
    wrapped: Callable[[Sequence[str]], Sequence[str]],
) -> None:
    """Starts machines, all at once, and waits until they take commands.

    `backends` and `namespace` say for a host on what and where it is, `wrapped` may put a command
    in front of a machine's own.  Raises LabError.
    """

    def start(those: Sequence[Machine]) -> None:
        for machine in those:
            host = machine.host
            machine.boot(topology, backends[host], namespace(host), wrapped)

    helped = Machine.whole_registers
    start(machines)
    killed = []
    for machine in machines:
        try:
            machine.wait_up()
        except Unsuited as error:
            if helped or error.number != signal.SIGSEGV:
                raise
            machine.kill()
            killed.append(machine)
    if killed:
        Machine.whole_registers = True
        start(killed)
        for machine in killed:
            machine.wait_up()


class Job:
    """A command in a machine."""

    def __init__(self, machine: Machine, folder: Path) -> None:
        self.machine = machine
        self.folder = folder
        self._identity = machine.identity
        self._status: int | None = None

    @property
    def pid(self) -> int:
        """Its process id, among those of the machine; waits until it has one."""
        return self.machine.until(lambda: self._number("pid"), "the start of a command", BOOT)

    def _number(self, name: str) -> int | None:
        """What the machine wrote into that file; None as long as it hasn't."""
        try:
            text = (self.folder / name).read_text()
        except FileNotFoundError:
            return None
        return int(text) if text.endswith("\n") else None

    def poll(self) -> int | None:
        """Its exit status, a negative signal number, or None while it runs.

        It is killed when its machine is.  A status over 128 is taken for a signal, as in a shell.
        """
        if self._status is None:
            ended = self._identity is None or not self._identity.alive
            status = self._number("status")
            if status is not None:
                self._status = 128 - status if 128 < status <= 128 + signal.SIGRTMAX else status
            elif ended:
                self._status = -signal.SIGKILL
        return self._status

    def wait(self, timeout: float) -> int:
        """Waits for its end.  Raises subprocess.TimeoutExpired."""
        deadline = time.monotonic() + timeout
        pause = 0.002
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.folder.name, timeout)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.02)
        return status

    def signal(self, number: int) -> None:
        """Sends a signal to it and to its process group, unless it or its machine has ended."""
        if self.poll() is None:
            with suppress(LabError):
                pid = self.pid  # it has begun: the machine knows whom to signal
                self.machine.request(f"signal {self.folder.name} {number} {pid}")

    def remove(self) -> None:
        """Removes its files."""
        shutil.rmtree(self.folder, ignore_errors=True)
