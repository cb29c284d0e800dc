"""Who has a socket open: asked of a process of krelay's own that may look, so that krelay need not.

What other users' processes have open is shown to a process that might as well take them over
(CAP_SYS_PTRACE, ptrace(2)).  krelay, which reads packets of anybody's, shall not be one.  So before
it gives that up (privileges.py) it starts a witness, which keeps that much, reads /proc, and makes
no connections: all it does is to answer which process holds one of some sockets.  It ends with
krelay.

If it is gone, nothing is known of anybody.  So it is while it doesn't answer (it can be stopped, as
any process): krelay has packets to see to, so one query is waited for, and no other is asked
until that one was answered.
"""

import json
import os
import signal
import socket
from collections.abc import Iterable
from contextlib import suppress
from typing import Any, NoReturn

from knet import listeners, privileges, process, seccomp, syscalls
from knet.listeners import Holder
from knet.privileges import Cap

ANSWER_WITHIN = 1.0
"""Seconds; to look at ten thousand processes takes a tenth."""
_ROOM = 1 << 16


class Witness:
    """The process, from construction to `close`.  To be made while there is no thread.

    Raises OSError.
    """

    def __init__(self) -> None:
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(ANSWER_WITHIN)
        self._asked = self._answered = 0
        parent = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            _serve(its, parent)
        its.close()

    def holds_any(self, pid: int, inodes: Iterable[int]) -> bool | None:
        """As listeners.holds_any."""
        answer = self._ask({"pid": pid, "inodes": list(inodes)})
        return answer if isinstance(answer, bool) else None

    def holder(self, inodes: Iterable[int]) -> Holder | None:
        """As listeners.holder."""
        answer = self._ask({"inodes": list(inodes)})
        if not isinstance(answer, list):
            return None
        return Holder(*answer)

    def close(self) -> None:
        """Ends it."""
        self._socket.close()
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)

    def _ask(self, query: dict[str, Any]) -> Any:
        try:
            if self._answered != self._asked:
                self._read(0.0)  # an answer that is not waited for any more
            if self._answered != self._asked:
                return None
            self._asked += 1
            self._socket.send(json.dumps({"number": self._asked, **query}).encode())
            return self._read(ANSWER_WITHIN)
        except (OSError, ValueError):
            return None

    def _read(self, within: float) -> Any:
        self._socket.settimeout(within)
        number, answer = json.loads(self._socket.recv(_ROOM))
        self._answered = number
        return answer


def _serve(its: socket.socket, parent: int) -> NoReturn:
    """The witness, which must not come back into krelay's frames."""
    try:
        os.setsid()  # Ctrl-C is krelay's to hear
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        kept = os.dup2(its.fileno(), 3) if its.fileno() != 3 else 3
        os.closerange(4, 1 << 20)
        privileges.give_up(keep=(Cap.SYS_PTRACE, Cap.DAC_READ_SEARCH))
        process.die_with(parent)
        with suppress(seccomp.FilterUnavailable):
            seccomp.load(syscalls.allowed("witness"), syscalls.DEADLY)
        with socket.socket(fileno=kept) as connection:
            while query := connection.recv(_ROOM):
                connection.send(_answer(json.loads(query)))
    except (OSError, KeyboardInterrupt):
        pass
    finally:
        os._exit(0)


def _answer(query: dict[str, Any]) -> bytes:
    return json.dumps([query["number"], _looked(query)]).encode()


def _looked(query: dict[str, Any]) -> Any:
    inodes = query["inodes"]
    if "pid" in query:
        return listeners.holds_any(query["pid"], inodes)
    found = listeners.holder(inodes)
    return None if found is None else list(found)
