"""The control socket from the other side: what the commands ask the daemon."""

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from krelay.wire import pcapng

CHUNK = 1 << 20
"""Bytes of a capture that are read at once."""
TIMEOUT = 10.0
"""Seconds for an answer; the daemon answers in milliseconds."""


class NoDaemon(Exception):
    """Nobody serves that tree.  The text says what to do."""


class Rejected(Exception):
    """The daemon answered with an error; the text is what it said."""


def ask(root: Path, request: str) -> list[str]:
    """The lines of the answer.  Raises NoDaemon, Rejected; OSError if it isn't whole."""
    with _connect(root) as connection:
        connection.sendall(request.encode() + b"\n")
        lines = []
        with connection.makefile(encoding="utf-8", errors="replace") as answer:
            for line in answer:
                if not (line := line.rstrip("\n")):
                    break
                if line.startswith("error: "):
                    raise Rejected(line.removeprefix("error: "))
                lines.append(line)
            else:
                raise ConnectionResetError("it hung up before the end of its answer")
        return lines


def ask_json(root: Path, request: str) -> list[dict[str, Any]]:
    """The objects of a JSON answer, one a line.  Raises NoDaemon, Rejected."""
    return [json.loads(line) for line in ask(root, request)]


def follow(root: Path, request: str) -> Iterator[str]:
    """Lines as they come, until the daemon ends.  Raises NoDaemon, Rejected."""
    with _connect(root) as connection:
        connection.settimeout(None)
        connection.sendall(request.encode() + b"\n")
        with connection.makefile(encoding="utf-8", errors="replace") as answer:
            for line in answer:
                if line.startswith("error: "):
                    raise Rejected(line.removeprefix("error: ").rstrip("\n"))
                yield line.rstrip("\n")


class Captured:
    """A capture that is under way: its blocks as they come, and when it is enough.

    `begun` are the first of them.  Raises NoDaemon, Rejected; OSError if there is no answer.
    """

    def __init__(self, root: Path, request: str) -> None:
        self._socket = _connect(root)
        try:
            self._socket.sendall(request.encode() + b"\n")
            data = self._beginning()
            end = pcapng.whole(data)
            self.begun, self._held = data[:end], data[end:]
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def fileno(self) -> int:
        """Readable when more has come, or the daemon has ended it."""
        return self._socket.fileno()

    def more(self) -> bytes | None:
        """What has come in whole blocks; waits for something to come.  None when it has ended.

        Raises pcapng.BadCapture.
        """
        try:
            data = self._socket.recv(CHUNK)
        except ConnectionResetError:
            return None
        if not data:
            return None
        data = self._held + data
        end = pcapng.whole(data)
        self._held = data[end:]
        return data[:end]

    def finish(self) -> None:
        """No packets from now on: the daemon says what it has to say, and ends it."""
        with suppress(OSError):  # it has ended by itself
            self._socket.shutdown(socket.SHUT_WR)

    def _beginning(self) -> bytes:
        """The first bytes, if they are those of a capture."""
        data = b""
        while len(data) < len(pcapng.MAGIC) or (_is_text(data) and not data.endswith(b"\n")):
            more = self._socket.recv(CHUNK)
            if not more:
                raise ConnectionResetError("it hung up without an answer")
            data += more
        if _is_text(data):
            raise Rejected(data.decode(errors="replace").strip().removeprefix("error: "))
        self._socket.settimeout(None)
        return data


def _is_text(data: bytes) -> bool:
    return not data.startswith(pcapng.MAGIC)


def _connect(root: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(TIMEOUT)
    try:
        connection.connect(str(root / "control.sock"))
    except PermissionError:
        connection.close()
        raise NoDaemon(
            f"no permission for {root}/control.sock; run as root or join the group krelay"
        ) from None
    except OSError:
        connection.close()
        raise NoDaemon(
            f"no krelay serves {root}; start one with `krelay daemon` or `krelay up`"
        ) from None
    return connection
