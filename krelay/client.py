"""The control socket from the other side: what the commands ask the daemon."""

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
