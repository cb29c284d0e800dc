"""The proxy under test: a process of which nothing is known but its command line."""

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Self

from krelay_vm.wires import listens
from tests.tprox.ends import Failure

GRACE = 5.0
"""Seconds to begin listening in, and to end in."""


class Proxy:
    """A process, for the duration of a `with` block; it must listen before the block begins.

    Its own session: what it forked ends with it, and Ctrl-C is for the tester.
    """

    def __init__(self, command: Sequence[str], listen: int) -> None:
        self._command = command
        self._listen = listen
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=self._output,
                start_new_session=True,
            )
            self._until_listening()
        except OSError as error:
            self._end()
            raise Failure(f"{self._command[0]} can't be started: {error.strerror}") from None
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def _until_listening(self) -> None:
        deadline = time.monotonic() + 2 * GRACE
        while not _listening(self._listen):
            if died := self.obituary():
                raise Failure(died)
            if time.monotonic() > deadline:
                raise Failure(
                    f"{' '.join(self._command)} does not listen at {self._listen}, after "
                    f"{2 * GRACE:g} s{self._last_words()}"
                )
            time.sleep(0.01)

    def _end(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            for number in (signal.SIGTERM, signal.SIGKILL):
                os.killpg(process.pid, number)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
                    break
        self._output.close()

    def obituary(self) -> str | None:
        """How the process ended, if it has, and its last words."""
        if self._process is None or (status := self._process.poll()) is None:
            return None
        how = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"the proxy has ended {how}{self._last_words()}"

    def _last_words(self) -> str:
        size = os.fstat(self._output.fileno()).st_size
        tail = os.pread(self._output.fileno(), 2000, max(0, size - 2000))
        lines = tail.decode(errors="replace").strip().splitlines()[-3:]
        return "; it said: " + " / ".join(lines) if lines else "; it said nothing"


def free_ports() -> tuple[int, int]:
    """Two ports of loopback that are in no use, and that no other tester chooses meanwhile.

    Below those that the kernel hands out by itself: they can't be taken until a proxy binds them.
    """
    for step in range(0, 10_000, 500):  # processes that run at a time have numbers near each other
        first = 20_000 + (2 * os.getpid() + step) % 10_000
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("", first))
            other.bind(("", first + 1))
            return first, first + 1
    raise Failure("no port is free for the proxy")


def _listening(port: int) -> bool:
    tables = [Path(f"/proc/net/{name}") for name in ("tcp", "tcp6")]
    return any(listens(table.read_text(), "tcp", port) for table in tables if table.exists())
