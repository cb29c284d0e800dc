"""krelay, tcp-relay and the servers of labs, started from a process that has loaded them already.

Labs start them some thousand times, and most of what that takes is to load the same modules: with
all else it would be a third of a whole run.  So each test process has a server for each of these,
a Python that has loaded the program and no more; it forks, and the child goes on as
`python -m PROGRAM` does: with the network, the arguments, the environment, the limits and the
standard files that it was asked for, the leader of a session, and mortal (krelay_vm.program).

What isn't exactly such a command is executed as ever: within another program (prlimit, unshare),
with other options of Python's, or where the environment differs in what Python or the linker reads.
KRELAY_EXEC=1 executes them all.
"""

import ctypes
import gc
import importlib
import json
import os
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

LOADED = {
    "krelay": ("knet.isolated", "knet.children", "krelay.cli.main", "krelay.daemon.daemon"),
    "tcp_relay": ("tcp_relay.__main__",),
    "tests.net.programs.server": ("hashlib", "random", "socket", "threading"),
}
"""What `python -m` loads before it begins to work, by program."""
COMMANDS = ("krelay.cli.up", "krelay.cli.capturing", "krelay.cli.tables")
"""What krelay's commands load beside that, to tell something or to look at the host."""
_LIMITS = sorted(number for name, number in vars(resource).items() if name.startswith("RLIMIT_"))
_CLONE_NEWNET = 0x40000000  # linux/sched.h
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MOST = 1 << 16
"""Bytes of a request; a longer one is executed."""


class Server:
    """The process that has loaded a program."""

    def __init__(self, program: str, more: Sequence[str] = ()) -> None:
        from knet.children import compiled_as_here

        self._lock = threading.Lock()
        self.settings = loaders(os.environ)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                (
                    *(sys.executable, *compiled_as_here(), "-m", __name__),
                    *(str(theirs.fileno()), str(os.getpid()), program, *LOADED[program], *more),
                ),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def start(self, request: Mapping[str, object], files: Sequence[int]) -> tuple[int, int]:
        """The pid of a new process, and a handle of it (pidfd_open(2))."""
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], list(files))
            answer, handles, _, _ = socket.recv_fds(self._socket, _MOST, 1)
        if not handles:
            raise OSError(f"{request['argv']}: the process that has loaded it has ended")
        return int(answer), handles[0]

    def status(self, pid: int) -> int:
        """How a process ended; waits for that (wait(2)).  With this server it is killed."""
        try:
            with self._lock:
                self._socket.send(json.dumps({"pid": pid}).encode())
                return int(self._socket.recv(_MOST) or signal.SIGKILL)
        except OSError:
            return signal.SIGKILL

    def cpu(self) -> float:
        """Seconds of it and of what it waited for (proc(5), /proc/PID/stat: utime to cstime)."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        """Ends it."""
        self._socket.close()
        self._process.wait()


class Popen(subprocess.Popen[bytes]):
    """As subprocess's; but a program that was loaded already is forked."""

    servers: dict[str, Server] = {}  # noqa: RUF012 - of all
    """By program; `krelay COMMAND` is another than the daemon, which loads less."""
    _lock = threading.Lock()
    _handle = -1

    # What the standard library's own does, at the one place where it makes the process.
    def _execute_child(self, args: Sequence[str], *given: Any) -> None:
        environment: Mapping[str, str] = given[5]
        found = _loaded(args)
        if found is None or (server := self._server(*found[1:], environment)) is None:
            super()._execute_child(args, *given)  # type: ignore[misc]
            return
        network, _, words = found
        pipes = given[9:15]
        request = {
            "argv": words,
            "network": network,
            "environment": dict(environment),
            "folder": os.getcwd(),
            "umask": _umask(),
            "limits": [(each, resource.getrlimit(each)) for each in _LIMITS],
        }
        standard = enumerate((pipes[0], pipes[3], pipes[5]))
        files = [own if file == -1 else file for own, file in standard]
        self._program = server
        self.pid, self._handle = server.start(request, files)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]

    def _server(
        self, program: str, words: Sequence[str], environment: Mapping[str, str]
    ) -> Server | None:
        """None if that environment is one for a Python of its own."""
        commands = program == "krelay" and words[:1] != ["daemon"]
        name, more = (f"{program} COMMAND", COMMANDS) if commands else (program, ())
        with self._lock:
            if name not in self.servers:
                self.servers[name] = Server(program, more)
        server = self.servers[name]
        return server if server.settings == loaders(environment) else None

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._handle < 0:
            return super()._try_wait(wait_flags)  # type: ignore[misc, no-any-return]
        return self._ended(self.pid, wait_flags)

    def _internal_poll(self, _deadstate: int | None = None, **_: Any) -> int | None:
        if self._handle < 0:
            return super()._internal_poll(_deadstate=_deadstate)  # type: ignore[misc, no-any-return]
        return super()._internal_poll(  # type: ignore[misc, no-any-return]
            _deadstate=_deadstate, _waitpid=self._ended
        )

    def _ended(self, pid: int, flags: int) -> tuple[int, int]:
        """As waitpid(2)."""
        ready = select.poll()
        ready.register(self._handle, select.POLLIN)
        if not ready.poll(0 if flags & os.WNOHANG else None):
            return 0, 0
        return pid, self._program.status(pid)

    def __del__(self, *given: Any) -> None:
        if self._handle >= 0:
            with suppress(OSError):
                os.close(self._handle)
        super().__del__(*given)


def close() -> None:
    """Ends all that have loaded something."""
    for server in Popen.servers.values():
        server.close()
    Popen.servers.clear()


def cpu() -> float:
    """Seconds that servers which run, and what they started and waited for, have computed."""
    return sum(server.cpu() for server in Popen.servers.values())


def loaders(environment: Mapping[str, str]) -> dict[str, str]:
    """What Python and the linker read of an environment before there is any code of ours."""
    return {name: text for name, text in environment.items() if name.startswith(("PYTHON", "LD_"))}


def _loaded(args: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """The network, the program and its arguments, if that is what this command line runs."""
    from knet.children import compiled_as_here
    from krelay_vm.program import mortal

    before = (*mortal(()), sys.executable, *compiled_as_here(), "-m")
    into, network, dashes, *rest = (*args, "", "", "")
    if (into, dashes) != ("nsenter", "--") or tuple(rest[: len(before)]) != before:
        return None
    program, *words = rest[len(before) : -3]
    fits = program in LOADED and sum(map(len, args)) < _MOST // 4
    return (network.removeprefix("--net="), program, words) if fits else None


def _umask() -> int:
    os.umask(present := os.umask(0o077))
    return present


# The other side


def serve(requests: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Forks whatever is asked for; returns in the child, with the request and its files."""
    while True:
        data, files, _, _ = socket.recv_fds(requests, _MOST, 3)
        if not data:
            os._exit(0)
        request = json.loads(data)
        if "pid" in request:
            _, status = os.waitpid(request["pid"], 0)
            requests.send(str(status).encode())
            continue
        pid = os.fork()
        if pid == 0:
            requests.close()
            return request, files
        handle = os.pidfd_open(pid)
        socket.send_fds(requests, [str(pid).encode()], [handle])
        for file in (handle, *files):
            os.close(file)


def become(request: Mapping[str, Any], files: Sequence[int], parent: int) -> None:
    """Makes this process what was asked for, but for the program."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    os.setsid()
    for at, file in enumerate(files):
        os.dup2(file, at)
    for file in files:
        os.close(file)
    network = os.open(request["network"], os.O_RDONLY | os.O_CLOEXEC)
    if libc.setns(network, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), request["network"])
    os.close(network)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    for number, limits in request["limits"]:
        if resource.getrlimit(number) != tuple(limits):
            resource.setrlimit(number, limits)
    os.environ.clear()
    os.environ.update(request["environment"])


def main() -> None:
    """`python -m tests.tools.prefork SOCKET OWNER PROGRAM MODULE...`."""
    descriptor, owner, program, *modules = sys.argv[1:]
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(owner):
        return
    for module in modules:
        importlib.import_module(module)
    sys.modules.pop(f"{program}.__main__", None)  # it is to be run, once
    gc.collect()
    gc.freeze()  # pages that are only read stay shared
    own = os.getpid()
    request, files = serve(socket.socket(fileno=int(descriptor)))
    become(request, files, own)
    sys.argv[1:] = request["argv"]
    runpy.run_module(program, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
