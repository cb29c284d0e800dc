"""A lab: a network that exists while a `with` block runs, and the programs in it; all of it goes.

    with Lab() as lab:
        lab.start("server", "python3", "-m", "http.server", "80")
        lab.wait_listening("server", "tcp", 80)
        print(lab.run("client", "curl", "-s", "http://192.168.0.1/").stdout)

Three nets catch what falls.  Leaving the block ends programs and removes the network, also after an
exception, Ctrl-C, SIGTERM or SIGHUP.  If this process is killed, the kernel ends its programs
(PR_SET_PDEATHSIG).  What then remains, namespaces and a directory, stands in the lab's record, from
which `build.remove_leftovers` clears it.

A host may also be a virtual machine (`krelay_vm.machine`), `Lab(backends={"client": "uml"})`: the
same calls run, start and end what is in it.  It has its host's name and addresses, its wires and
their captures are as they would be, and it ends with the lab like a program.  Only `enter` can't be
had.
"""

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from knet import listeners
from krelay_vm import guest, netns
from krelay_vm.build import build, machines, remove
from krelay_vm.errors import LabError, LabTimeout
from krelay_vm.machine import Machine, boot_all
from krelay_vm.program import (
    Process,
    Program,
    Result,
    end_all,
    mortal,
    obituaries,
    run_here,
    run_job,
    start_here,
    tail,
)
from krelay_vm.registry import Owner, Record
from krelay_vm.signals import ended_by_signals, uninterrupted
from krelay_vm.topology import DEFAULT, Topology
from krelay_vm.wires import listening_to, listens, set_link

T = TypeVar("T")


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
            self._signals.enter_context(ended_by_signals())
            with uninterrupted():
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
        with self._signals, uninterrupted():
            try:
                for machine in self._machines.values():
                    machine.kill()
                end_all(self.programs)
            finally:
                record, self._record = self._record, None
                if record is not None:
                    remove(record)

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
            command = self._command(host, argv)
            result = run_here(command, f"{host}: {' '.join(argv)}", text, timeout, env)
        if check and result.status != 0:
            ended = f"{host}: {' '.join(argv)} ended with status {result.status}"
            raise LabError(ended + tail(result.stderr or result.stdout))
        return result

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
        started: Process
        if not self._is_machine(host):
            started = start_here(self._command(host, argv), log, env)
        elif not log.resolve().is_relative_to(self.directory):
            raise LabError(f"{host}, a virtual machine, can't write {log}: not in {self.directory}")
        else:
            log.touch()
            started = self._machine(host).submit(argv, log=log, env=env)
        program = Program(host, argv, log, started)
        self.programs.append(program)
        return program

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
        set_link(self.topology, self.name, host, interface, up=False)

    def link_up(self, host: str, interface: str = "eth0") -> None:
        """Puts it in again."""
        set_link(self.topology, self.name, host, interface, up=True)

    def wait(self, condition: Callable[[], T | None], what: str, timeout: float = 10.0) -> T:
        """Asks until the condition returns something true, and returns that.

        Raises LabTimeout after `timeout` seconds, which names `what` and shows what programs that
        have ended said.
        """
        deadline = time.monotonic() + timeout
        pause = 0.001
        while not (found := condition()):
            if time.monotonic() > deadline:
                raise LabTimeout(f"{what}: not within {timeout:g} s{obituaries(self.programs)}")
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        return found

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
            if proto == "tcp":
                return bool(listeners.listening(port))
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
