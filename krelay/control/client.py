"""The control sockets from the other side: what the commands ask the daemon.

A user who may not use control.sock asks view.sock what that answers (roles.py).
"""

import errno
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from knet.roles import ADMIN, VIEW, Role, needs_admin, refusal
from knet.unixsock import group_id
from knet.wire import pcapng

CHUNK = 1 << 20
"""Bytes of a capture that are read at once."""
TIMEOUT = 10.0
"""Seconds for an answer; the daemon answers in milliseconds."""


class NoDaemon(Exception):
    """No krelay serves that tree, or not this user.  The text says what to do."""


class NoPermission(NoDaemon):
    """A krelay serves it, but not this user."""


class Rejected(Exception):
    """The daemon answered with an error; the text is what it said."""


def ask(root: Path, request: str) -> list[str]:
    """The lines of the answer.  Raises NoDaemon, Rejected; OSError if it isn't whole."""
    with _connect(root, request) as connection:
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
    with _connect(root, request) as connection:
        connection.settimeout(None)
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
        self._socket = _connect(root, request)
        try:
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


def _connect(root: Path, request: str) -> socket.socket:
    """A connection on which this was asked.  Raises NoDaemon; OSError if it can't be said."""
    roles = (ADMIN,) if needs_admin(request.split()) else (ADMIN, VIEW)
    for role in roles:
        try:
            connection = _connected(root / role.socket)
        except PermissionError:
            continue
        except OSError as error:
            if role is VIEW and isinstance(error, FileNotFoundError):
                break  # a krelay that has none
            raise NoDaemon(
                f"no krelay serves {root}; start one with `krelay daemon` or `krelay up`"
            ) from None
        try:
            connection.sendall(request.encode() + b"\n")
        except BrokenPipeError:
            pass  # it has hung up, and has said why
        except BaseException:
            connection.close()
            raise
        return connection
    raise NoPermission(f"no permission for {root}: {_needed(roles)}")


def _needed(roles: tuple[Role, ...]) -> str:
    """What a user who may use none of these has to do: the least first."""
    role = roles[-1]
    told = refusal(role, exists=group_id(role.group) is not None)
    return f"{told}; {ADMIN.group} may do everything" if role is VIEW else told


def _connected(path: Path) -> socket.socket:
    """A connection to the socket there; waits TIMEOUT at most while others are accepted first.

    The kernel wakes it at each place that comes free (unix(7)).  Looking now and then wouldn't do:
    the place would be taken again, by members that connect without pause.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(TIMEOUT))
        connection.connect(str(path))
        while not _is_connected(connection):
            connection.connect(str(path))
        connection.settimeout(TIMEOUT)
    except BaseException:
        connection.close()
        raise
    return connection


def _is_connected(connection: socket.socket) -> bool:
    """Whether it is; not if a signal came meanwhile, which Python takes for success."""
    try:
        connection.getpeername()
    except OSError as error:
        if error.errno != errno.ENOTCONN:
            raise
        return False
    return True


def _timeval(seconds: float) -> bytes:
    """A time limit for SO_SNDTIMEO, which holds for `connect` too (socket(7))."""
    return struct.pack("@ll", int(seconds), int(seconds % 1 * 1e6))
