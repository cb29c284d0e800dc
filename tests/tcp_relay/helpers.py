"""tcp-relay and tcpproxy as processes, servers behind them, and waiting for what must come."""

import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from knet.endpoint import Endpoint
from knet.loop import Loop
from procfs_sim import FileTree

LOCALHOST = "127.0.0.1"
BOUND = 30.0
"""Seconds after which waiting is a failure."""


def wait_for(
    condition: Callable[[], object], what: str, bound: float = BOUND, pause: float = 0.002
) -> None:
    """Returns when `condition` is true, asked with such pauses; fails after `bound` seconds."""
    deadline = time.monotonic() + bound
    while not condition():
        assert time.monotonic() < deadline, f"waited {bound} s for {what}"
        time.sleep(pause)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as sock:
        sock.bind((LOCALHOST, 0))
        port: int = sock.getsockname()[1]
        return port


class Server:
    """Accepts on a port of the loopback; `serve` has each connection in a thread of its own."""

    def __init__(self, serve: Callable[[socket.socket], None]) -> None:
        self._serve = serve
        self._socket = socket.create_server((LOCALHOST, 0), backlog=1024)
        self.endpoint = Endpoint.of(*self._socket.getsockname())
        self.peers: list[tuple[str, int]] = []
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._accepting.join(BOUND)
        self._socket.close()
        for thread in self._threads:
            thread.join(BOUND)
            assert not thread.is_alive()

    def _accept(self) -> None:
        while True:
            try:
                client, peer = self._socket.accept()
            except OSError:
                return
            self.peers.append(peer)
            thread = threading.Thread(target=self._one, args=(client,))
            self._threads.append(thread)
            thread.start()

    def _one(self, client: socket.socket) -> None:
        with client:
            client.settimeout(BOUND)
            with suppress(OSError):
                self._serve(client)


def echo(sock: socket.socket) -> None:
    """Gives back what comes, and the end of file."""
    while data := sock.recv(65536):
        sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def until_closed(sock: socket.socket) -> None:
    """Says nothing."""
    while sock.recv(65536):
        pass


class Program:
    """A relay program that runs, with `log` as its stderr; it may have `limit` descriptors."""

    def __init__(self, log: Path, *command: str, limit: int | None = None) -> None:
        self._log = log
        argv = [sys.executable, "-m", *command]
        if limit is not None:
            argv = ["sh", "-c", f'ulimit -n {limit}; exec "$@"', "sh", *argv]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(argv, stderr=stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(BOUND)
        assert "Traceback" not in self.log, self.log

    @property
    def log(self) -> str:
        """All it has said."""
        return self._log.read_text()

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Until it has said that."""
        wait_for(lambda: self._says(text) >= times, f"{text!r} in the log:\n{self.log}")

    def _says(self, text: str) -> int:
        count = self.log.count(text)
        assert count or self.process.poll() is None, f"ended without {text!r}:\n{self.log}"
        return count

    def wait_until_still(self) -> None:
        """Until it sleeps."""
        wait_for(self._stands_still, "the program to sleep")

    def _stands_still(self) -> bool:
        before = self.wake_ups()
        threading.Event().wait(0.05)
        return self.wake_ups() == before

    def limit_descriptors(self, more: int) -> None:
        """It can't have more than so many beside those it has."""
        limit = self.descriptors() + more
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (limit, limit))

    def end(self, signum: int = signal.SIGTERM) -> int:
        """Its exit status."""
        self.process.send_signal(signum)
        return self.process.wait(BOUND)

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wake_ups(self) -> int:
        """How often it has gone to sleep so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("\nvoluntary_ctxt_switches:")[2].split()[0])


class TcpRelay(Program):
    """tcp-relay on a file tree at `root`, which is made with a gateway port that is free."""

    def __init__(
        self, root: Path, *arguments: str, make_tree: bool = True, limit: int | None = None
    ) -> None:
        self.root = root
        self.gport = free_port()
        if make_tree:
            self.make_tree()
        log = root.parent / f"{root.name}.log"
        super().__init__(log, "tcp_relay", "--root", str(root), *arguments, limit=limit)

    def make_tree(self) -> None:
        """What krelay would have made."""
        FileTree(self.root).create()
        (self.root / "gport").write_text(f"{self.gport}\n")

    def ready(self) -> Self:
        """Waits until it listens and talks to krelay."""
        self.wait_for_log(f"listening gport={self.gport}")
        return self

    def dial(self, port: int | None = None) -> socket.socket:
        """A client."""
        return socket.create_connection((LOCALHOST, port or self.gport), timeout=BOUND)


class TcpProxy(Program):
    """tcpproxy to `host` and `port`, on a port that is free; its log is in the folder `at`."""

    def __init__(
        self, at: Path, host: str, port: int, *arguments: str, limit: int | None = None
    ) -> None:
        self.port = free_port()
        command = (host, str(port), str(self.port), *arguments)
        log = at / f"tcpproxy-{self.port}.log"
        super().__init__(log, "tcp_relay.tcpproxy", *command, limit=limit)

    def ready(self) -> Self:
        """Waits until it listens; of several workers, the first."""
        self.wait_for_log("listening ")
        return self

    def dial(self, host: str = LOCALHOST) -> socket.socket:
        """A client."""
        return socket.create_connection((host, self.port), timeout=BOUND)


def everything(sock: socket.socket) -> bytes:
    """What comes until the end of file."""
    chunks = []
    while data := sock.recv(65536):
        chunks.append(data)
    return b"".join(chunks)


def was_reset(sock: socket.socket) -> bool:
    """Waits until the connection is over: True if by a reset, False if by an end of file."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False


def reset(sock: socket.socket) -> None:
    """Closes with a reset."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def is_quiet(sock: socket.socket, seconds: float = 0.1) -> bool:
    """Whether nothing arrives for that long."""
    return not select.select([sock], [], [], seconds)[0]


def exactly(sock: socket.socket, count: int) -> bytes:
    """So many bytes, or fewer if the end comes before."""
    data = b""
    while len(data) < count and (more := sock.recv(count - len(data))):
        data += more
    return data


def fill(sock: socket.socket) -> int:
    """Writes until nothing more goes in; how much that was.  Afterwards it doesn't block."""
    sock.setblocking(False)
    sent = 0
    with suppress(BlockingIOError):
        while True:
            sent += sock.send(bytes(65536))
    return sent


def drain(sock: socket.socket) -> tuple[int, bool]:
    """Reads what is there: how much, and whether the end of file was behind it."""
    sock.setblocking(False)
    count = 0
    with suppress(BlockingIOError):
        while data := sock.recv(65536):
            count += len(data)
        return count, True
    return count, False


@contextmanager
def full_server() -> Iterator[tuple[str, int]]:
    """The address of a server that doesn't answer a SYN: its queue is full."""
    with socket.socket() as full, socket.socket() as first:
        full.bind((LOCALHOST, 0))
        full.listen(0)
        first.connect(full.getsockname())  # the one that fits
        yield full.getsockname()


def turns(loop: Loop, count: int = 1) -> None:
    """So many turns of the loop that don't wait."""
    for _ in range(count):
        loop.call_soon(lambda: loop.call_soon(loop.stop))
        loop.run()


def run_for(loop: Loop, seconds: float) -> None:
    """Runs the loop for that long."""
    loop.call_at(time.monotonic() + seconds, loop.stop)
    loop.run()


def run_until(loop: Loop, condition: Callable[[], bool]) -> None:
    """Runs the loop until the condition holds."""
    deadline = time.monotonic() + BOUND
    while not condition():
        assert time.monotonic() < deadline
        loop.call_at(loop.clock() + 0.001, loop.stop)
        loop.run()
