"""tcp-relay as a process, servers to relay to, and waiting for what must come."""

import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

from krelay.flow import Endpoint
from krelay.loop import Loop
from procfs_sim import FileTree

LOCALHOST = "127.0.0.1"
BOUND = 10.0
"""Seconds after which waiting is a failure."""


def wait_for(condition: Callable[[], object], what: str, bound: float = BOUND) -> None:
    """Returns when `condition` is true; fails after `bound` seconds."""
    deadline = time.monotonic() + bound
    while not condition():
        assert time.monotonic() < deadline, f"waited {bound} s for {what}"
        time.sleep(0.002)


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


class TcpRelay:
    """The daemon on a file tree at `root`, which is made with a gateway port that is free."""

    def __init__(self, root: Path, *arguments: str, make_tree: bool = True) -> None:
        self.root = root
        self.gport = free_port()
        self._log = root.parent / f"{root.name}.log"
        if make_tree:
            self.make_tree()
        with self._log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tcp_relay", "--root", str(root), *arguments],
                stderr=stderr,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(BOUND)
        assert "Traceback" not in self.log, self.log

    def make_tree(self) -> None:
        """What krelay would have made."""
        FileTree(self.root).create()
        (self.root / "gport").write_text(f"{self.gport}\n")

    @property
    def log(self) -> str:
        """All it has said."""
        return self._log.read_text()

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Until it has said that."""
        wait_for(lambda: self.log.count(text) >= times, f"{text!r} in the log:\n{self.log}")

    def ready(self) -> Self:
        """Waits until it listens and talks to krelay."""
        self.wait_for_log(f"listening gport={self.gport}")
        return self

    def dial(self, port: int | None = None) -> socket.socket:
        """A client."""
        return socket.create_connection((LOCALHOST, port or self.gport), timeout=BOUND)

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


def run_until(loop: Loop, condition: Callable[[], bool]) -> None:
    """Runs the loop until the condition holds."""
    deadline = loop.now + BOUND

    def look() -> None:
        assert loop.now < deadline
        if condition():
            loop.stop()
        else:
            loop.call_at(loop.now + 0.001, look)

    look()
    loop.run()
