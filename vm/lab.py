"""A lab: a network that exists while a `with` block runs, and the programs in it; all of it goes.

    with Lab() as lab:
        lab.start("server", "python3", "-m", "http.server", "80")
        lab.wait_listening("server", "tcp", 80)
        print(lab.run("client", "curl", "-s", "http://192.168.0.1/").stdout)

Three nets catch what falls.  Leaving the block ends programs and removes the network, also after an
exception, Ctrl-C, SIGTERM or SIGHUP.  If this process is killed, the kernel ends its programs
(PR_SET_PDEATHSIG).  What then remains, namespaces and a directory, stands in the lab's record, from
which `remove_leftovers` clears it.

Programs run in sessions of their own: a Ctrl-C at the terminal reaches only us, and a program ends
together with its children.  They are started by nsenter and setpriv, which exec, so that their pid
is the program's: no code runs between fork and exec, which with threads about would be unsafe.
They write to a file, not to a pipe: nobody has to read along.

A host may also be a virtual machine (`krelay_vm.machine`), `Lab(backends={"client": "uml"})`: the
same calls run, start and end what is in it.  It has its host's name and addresses, its wires and
their captures are as they would be, and it ends with the lab like a program.  Only `enter` can't be
had.
"""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol, Self, TypeVar

from krelay_vm import guest, kernels, netns, registry
from krelay_vm.errors import LabError, LabTimeout
from krelay_vm.machine import Job, Machine, boot_all
from krelay_vm.registry import Owner, Record
from krelay_vm.topology import DEFAULT, Topology

T = TypeVar("T")

LAB_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
GRACE = 2.0
"""Seconds that programs have to end by themselves after SIGTERM."""

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""What ends a process that is asked to end."""

ETH_P_ALL = 3  # linux/if_ether.h
_UNLESS_ORPHANED = ("sh", "-c", '[ $PPID = "$1" ] && shift && exec "$@"', "sh")
"""Who is killed before PR_SET_PDEATHSIG is set leaves a child that nothing will end (prctl(2))."""

LISTENING = {"tcp": "0A", "udp": "07"}
"""TCP_LISTEN; and TCP_CLOSE, which a bound UDP socket shows (include/net/tcp_states.h)."""


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


class Lab:
    """A network of virtual hosts, for the duration of a `with` block.  Needs root.

    `name` (small letters, digits, hyphens) begins the names of its namespaces, `NAME-HOST`; by
    default it is made up, so that labs work side by side.  `backends` says what hosts are on:
    `netns`, `uml` or `qemu`, one for all or by host, those not named on `netns`.  Entering raises
    LabError if the lab can't be built.
    """

    def __init__(
        self,
        topology: Topology = DEFAULT,
        name: str | None = None,
        backends: str | Mapping[str, str] = "netns",
    ) -> None:
        self.topology = topology
        self.backends = machines(topology, backends)
        """The backends of those hosts that are virtual machines."""
        self.programs: list[Program] = []
        self._machines: dict[str, Machine] = {}
        self._wanted_name = name
        self._record: Record | None = None
        self._signals = ExitStack()

    def __enter__(self) -> Self:
        try:
            self._signals.enter_context(_ended_by_signals())
            with _uninterrupted():
                self._record = build(self.topology, self._wanted_name, Owner.me(), self.backends)
            self.boot(*self.backends)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the programs and removes the lab, undisturbed by signals.  Harmless if repeated."""
        with self._signals, _uninterrupted():
            try:
                for machine in self._machines.values():
                    machine.kill()
                self._end_programs()
            finally:
                record, self._record = self._record, None
                if record is not None:
                    remove(record)

    def _end_programs(self) -> None:
        for program in self.programs:
            program.terminate()
        deadline = time.monotonic() + GRACE
        for program in self.programs:
            with suppress(LabTimeout):
                program.wait(max(0.0, deadline - time.monotonic()))
        for program in self.programs:
            program.kill()
            program.wait()

    @property
    def record(self) -> Record:
        """Names of what the lab consists of.  Raises LabError outside the `with` block."""
        if self._record is None:
            raise LabError("the lab is not open: use it in a with block")
        return self._record

    @property
    def name(self) -> str:
        """The lab's name, unique on this machine."""
        return self.record.name

    @property
    def directory(self) -> Path:
        """A temporary directory, open to all users, that goes with the lab."""
        return Path(self.record.directory)

    def namespace(self, host: str) -> str:
        """The name of the host's network namespace.  Raises TopologyError for an unknown host."""
        return f"{self.name}-{self.topology.host(host).name}"

    def address(self, host: str, towards: str | None = None) -> str:
        """The first address of the host, or the one on its link to the host `towards`."""
        return self.topology.interface(host, towards).address

    def run(
        self,
        host: str,
        *argv: str,
        input: str | bytes | None = None,
        timeout: float = 10.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
    ) -> Result:
        """Runs a command in the host and waits until it has ended and its output is closed.

        `env` is added to the environment.  Raises LabTimeout after `timeout` seconds, the command
        being killed, and, if `check`, LabError for an exit status other than 0.
        """
        text = input.encode() if isinstance(input, str) else input
        if self._is_machine(host):
            result = run_job(self._machine(host), argv, text, timeout, env)
        else:
            result = self._run_here(host, argv, text, timeout, env)
        if check and result.status != 0:
            ended = f"{host}: {' '.join(argv)} ended with status {result.status}"
            raise LabError(ended + _tail(result.stderr or result.stdout))
        return result

    def _run_here(
        self,
        host: str,
        argv: tuple[str, ...],
        text: bytes | None,
        timeout: float,
        env: Mapping[str, str] | None,
    ) -> Result:
        began = time.monotonic()
        with subprocess.Popen(
            self._command(host, argv),
            stdin=subprocess.DEVNULL if text is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(env),
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(text, timeout)
            except BaseException as error:
                # The group, not the process: a child may hold the pipes, and it is what hangs.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                took = f"{host}: {' '.join(argv)} took longer than {timeout:g} s"
                raise LabTimeout(took + _tail(_text(error.output) + _text(error.stderr))) from None
        return Result(process.returncode, _text(out), _text(err), time.monotonic() - began)

    def start(
        self,
        host: str,
        *argv: str,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> Program:
        """Starts a program in the host; it ends with the lab or with the thread that started it.

        Its output is appended to `log`, by default a file in the lab's directory.  `env` is added
        to the environment.  In a virtual machine `log` must lie in the lab's directory.
        """
        if not argv:
            raise LabError("no command given")
        if log is None:
            log = self.directory / f"{host}-{len(self.programs)}-{Path(argv[0]).name}.log"
        started = (
            self._start_there(host, argv, log, env)
            if self._is_machine(host)
            else self._start_here(host, argv, log, env)
        )
        program = Program(host, argv, log, started)
        self.programs.append(program)
        return program

    def _start_there(
        self, host: str, argv: tuple[str, ...], log: Path, env: Mapping[str, str] | None
    ) -> Process:
        if not log.resolve().is_relative_to(self.directory):
            raise LabError(f"{host}, a virtual machine, can't write {log}: not in {self.directory}")
        log.touch()
        return self._machine(host).submit(argv, log=log, env=env)

    def _start_here(
        self, host: str, argv: tuple[str, ...], log: Path, env: Mapping[str, str] | None
    ) -> Process:
        with log.open("ab") as output:
            process = subprocess.Popen(
                self._command(host, argv),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=_environment(env),
                start_new_session=True,
            )
        return Local(process)

    def _command(self, host: str, argv: tuple[str, ...]) -> tuple[str, ...]:
        if not argv:
            raise LabError("no command given")
        return netns.command(self.namespace(host), *mortal(argv))

    def _is_machine(self, host: str) -> bool:
        return self.topology.host(host).name in self.backends

    def _machine(self, host: str) -> Machine:
        if not self._is_machine(host):
            raise LabError(f"{host} is a namespace, not a virtual machine")
        if host not in self._machines:
            self._machines[host] = Machine(host, self.directory)
        return self._machines[host]

    def boot(self, *hosts: str) -> None:
        """Starts these virtual machines, all at once, and waits until they take commands.

        They end with the lab, or with the thread that calls this.  Raises LabError.
        """
        for host in hosts:
            if self._machine(host).alive:
                raise LabError(f"{host} runs already")
        for host in hosts:
            self._machines[host].kill()  # it has ended: nothing stays of its process
            self._machines[host] = Machine(host, self.directory)
        booting = [self._machines[host] for host in hosts]
        boot_all(booting, self.topology, self.backends, self.namespace, mortal)

    def alive(self, host: str) -> bool:
        """Whether a virtual machine runs."""
        return self._machine(host).alive

    def kill(self, host: str) -> None:
        """Cuts a virtual machine's power; its programs have then been killed."""
        self._machine(host).kill()

    def link_down(self, host: str, interface: str = "eth0") -> None:
        """Pulls the cable of that interface."""
        self._set_link(host, interface, up=False)

    def link_up(self, host: str, interface: str = "eth0") -> None:
        """Puts it in again."""
        self._set_link(host, interface, up=True)

    def _set_link(self, host: str, interface: str, *, up: bool) -> None:
        self.namespace(host)
        try:
            netns.set_link(self.topology, self.name, host, interface, up=up)
        except OSError as error:
            raise LabError(f"{host} {interface}: {error.strerror}") from None

    def wait(self, condition: Callable[[], T | None], what: str, timeout: float = 10.0) -> T:
        """Asks until the condition returns something true, and returns that.

        Raises LabTimeout after `timeout` seconds, which names `what` and shows what programs that
        have ended said.
        """
        deadline = time.monotonic() + timeout
        pause = 0.001
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise LabTimeout(f"{what}: not within {timeout:g} s{self._obituaries()}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        return found

    def _obituaries(self) -> str:
        ended = [program for program in self.programs if program.poll() is not None]
        return "".join(
            f"\n{program} has ended with status {program.poll()}{_tail(program.output)}"
            for program in ended
        )

    def wait_listening(self, host: str, proto: str, port: int, timeout: float = 10.0) -> None:
        """Waits until a `tcp` socket listens, or a `udp` one is bound.  Raises LabTimeout."""
        self.wait(
            lambda: self.is_listening(host, proto, port),
            f"{host} listening at {proto}/{port}",
            timeout,
        )

    def is_listening(self, host: str, proto: str, port: int) -> bool:
        """Whether a `tcp` socket listens there, or a `udp` one is bound."""
        if self._is_machine(host):
            tables = [f"/proc/net/{proto}{v}" for v in ("", "6")]
            shown = self.run(host, guest.BUSYBOX, "cat", *tables, check=False).stdout
            return listens(shown, proto, port)
        with self.enter(host):
            files = [Path(f"/proc/thread-self/net/{proto}{v}") for v in ("", "6")]
            return any(listens(file.read_text(), proto, port) for file in files if file.exists())

    @contextmanager
    def enter(self, host: str) -> Iterator[None]:
        """The calling thread is inside the host's network; sockets opened here belong to that.

        Close them before the lab ends: a socket keeps its network alive, nameless.  Raises LabError
        for a virtual machine.
        """
        if self._is_machine(host):
            raise LabError(
                f"{host} can't be entered: it is a virtual machine ({self.backends[host]}), whose "
                "network is its own kernel's; use run or start"
            )
        with netns.inside(self.namespace(host)):
            yield

    def capture(self, host: str, interface: str = "eth0") -> socket.socket:
        """A packet socket that receives every frame of the interface (packet(7)); close it.

        `recvfrom` tells the direction: PACKET_OUTGOING at index 2 of the address.
        """
        try:
            return listening_to(self.namespace(host), interface)
        except OSError as error:
            raise LabError(f"{host} {interface}: {error.strerror}") from None

    @staticmethod
    def leftovers() -> list[str]:
        """The names of labs whose process is gone without having removed them."""
        return [record.name for record in registry.records() if record.stale]

    @staticmethod
    def remove_leftovers() -> list[str]:
        """Removes those, and returns their names."""
        stale = [record for record in registry.records() if record.stale]
        for record in stale:
            remove(record)
        return [record.name for record in stale]


def listening_to(namespace: str, interface: str) -> socket.socket:
    """A packet socket that receives every frame of an interface.  Raises OSError."""
    with netns.inside(namespace):
        # Protocol 0 receives nothing: no frame of another interface gets in before the bind.
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        try:
            packets.bind((interface, ETH_P_ALL))
        except OSError:
            packets.close()
            raise
    return packets


def machines(topology: Topology, backends: str | Mapping[str, str]) -> dict[str, str]:
    """The hosts that are virtual machines, each with its backend.  Raises LabError."""
    chosen = dict.fromkeys(topology.names, backends) if isinstance(backends, str) else backends
    for host, backend in chosen.items():
        topology.host(host)
        if backend not in guest.BACKENDS:
            raise LabError(f"no backend {backend!r}; there are {', '.join(guest.BACKENDS)}")
    return {host: backend for host, backend in chosen.items() if backend != guest.BACKENDS[0]}


def mortal(argv: Sequence[str]) -> tuple[str, ...]:
    """The command line that runs `argv`, as the same process, for as long as this thread lives."""
    owner = str(os.getpid())
    return ("setpriv", "--pdeathsig", "KILL", "--", *_UNLESS_ORPHANED, owner, *argv)


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
        raise LabTimeout(took + _tail(_said(job)) + machine.last_lines()) from None
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


def build(
    topology: Topology,
    name: str | None,
    owner: Owner | None,
    backends: Mapping[str, str],
) -> Record:
    """Builds a lab, which stays if it has no owner; its machines are off.

    Raises LabError, and leaves nothing then.
    """
    if os.geteuid() != 0:
        raise LabError("needs root (network namespaces); try with sudo")
    if name is not None and not LAB_NAME.fullmatch(name):
        raise LabError(f"{name!r} is not a lab's name: a-z, then up to 31 of a-z, 0-9 and hyphen")
    for backend in set(backends.values()):
        kernels.kernel(backend)
    with registry.locked():
        record = _claim(topology, name, owner, backends)
        try:
            directory = Path(record.directory)
            directory.mkdir()
            directory.chmod(0o755)
            netns.build(topology, record.name, backends)
        except OSError as error:
            _discard(record)
            raise LabError(f"lab {record.name}: {error.strerror}") from error
        except BaseException:
            _discard(record)
            raise
    return record


def _claim(
    topology: Topology, name: str | None, owner: Owner | None, backends: Mapping[str, str]
) -> Record:
    for _ in range(100):
        chosen = name or f"krelay-{secrets.token_hex(2)}"
        record = Record(
            name=chosen,
            hosts=topology.names,
            namespaces=tuple(f"{chosen}-{host}" for host in netns.namespaces(topology)),
            directory=f"{tempfile.gettempdir()}/{chosen}",
            owner=owner,
            machines=tuple(backends.items()),
        )
        taken = [n for n in record.namespaces if (netns.RUN / n).exists()]
        if not taken and not Path(record.directory).exists() and registry.claim(record):
            return record
        if name:
            break
    raise LabError(f"there is a lab {name} already, or something else of that name")


def boot_to_stay(record: Record, topology: Topology) -> None:
    """Starts the machines of a lab that stays; they outlive this process.  Raises LabError."""
    booting = [Machine(host, Path(record.directory)) for host, _ in record.machines]
    boot_all(booting, topology, dict(record.machines), f"{record.name}-{{}}".format, tuple)


def remove(record: Record) -> None:
    """Removes a lab: whatever still runs in its namespaces, these, its directory, its record."""
    with registry.locked():
        _discard(record)


def _discard(record: Record) -> None:
    netns.kill(record.namespaces)
    deadline = time.monotonic() + GRACE
    while netns.processes(record.namespaces) and time.monotonic() < deadline:
        time.sleep(0.005)
    netns.remove(record.namespaces)
    # The path comes from a file: what isn't called like the lab was not made by it.
    if Path(record.directory).name == record.name:
        shutil.rmtree(record.directory, ignore_errors=True)
    registry.release(record.name)


def listens(table: str, proto: str, port: int) -> bool:
    """Whether /proc/net/{tcp,udp}[6] (proc(5)) shows a socket that waits at the port."""
    rows = (line.split() for line in table.splitlines() if ":" in line)
    return any(
        int(row[1].rpartition(":")[2], 16) == port and row[3] == LISTENING[proto] for row in rows
    )


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Signals that would raise an exception wait for the block's end; else half of it is left.

    A signal mask is not enough: another thread that hasn't got it takes the signal, and Python then
    runs the handler in the main thread all the same.  So the handlers are exchanged; threads other
    than the main one never run any.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in ENDING}
    before = {number: handler for number, handler in before.items() if handler is not None}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for late in came:
            signal.raise_signal(late)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit, unless somebody else has decided what they do."""
    changed = []
    if threading.current_thread() is threading.main_thread():
        for number in ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _exit)
                changed.append(number)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    return {**os.environ, **(extra or {})}


def _text(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")


def _tail(output: str, lines: int = 10) -> str:
    """The last lines, indented below a message."""
    return "".join(f"\n    {line}" for line in output.splitlines()[-lines:])
