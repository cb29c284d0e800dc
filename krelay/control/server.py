"""The control sockets themselves: lines in and out for clients, none of whom can hold us up.

There are two, of one language: control.sock with all of it, and view.sock for users who may only
look.

A client has a bounded buffer in either direction.  Lines of an answer are made only as fast as the
client takes them; a tracing client that is too slow loses packets and is told how many.  Who says
nothing and has asked for nothing, or doesn't read, for IDLE seconds is dropped.

However many ask, and however fast they read: in a turn of the loop one request is heard, or one
piece of an answer made, and as long as packets come that takes a quarter of the time (turns.py).
Root's come first.
"""

import socket
from pathlib import Path

from knet.loop import Loop, Timer
from knet.roles import ADMIN, VIEW, Role
from knet.unixsock import Crowd, Peer, UnixListener
from krelay.control.clients import ControlClient, error_line
from krelay.control.commands import RelayView
from krelay.control.turns import Turns
from krelay.datapath.verdict import Verdict
from krelay.datapath.worker import Worker
from krelay.nat.flow import Rewrite
from krelay.trace.lines import REWRITE, WORDS, Untouched

MAX_CLIENTS, MAX_OF_ONE = 64, 16
"""Of each socket, in all and of one user who isn't root (unixsock.Crowd)."""
MAX_TRACERS, MAX_TRACERS_OF_ONE = 32, 4
"""The same for those that trace, of both sockets together: each costs something per packet."""
END_AFTER = 0.1
"""Seconds after the end of a trace until its flows may be offloaded again."""


class ControlSocket:
    """Listens at `root` for both roles, and answers for `relay`.  Raises OSError if it can't."""

    def __init__(self, loop: Loop, root: Path, relay: RelayView, worker: Worker) -> None:
        self._loop = loop
        self._relay = relay
        self._worker = worker
        self._clients: set[ControlClient] = set()
        self._tracers = Crowd(MAX_TRACERS, MAX_TRACERS_OF_ONE)
        self._turns = Turns(loop)
        self._ending: Timer | None = None
        self.listeners: list[UnixListener] = []
        """One for each role."""
        try:
            for role in (ADMIN, VIEW):
                self.listeners.append(self._listening(root, role))
        except OSError:
            self.close()
            raise

    @property
    def traces(self) -> int:
        """How many traces are in force."""
        return sum(client.tracing is not None for client in self._clients)

    def on_time(self, now: float) -> None:
        """Drops clients that have been silent for too long; call about once a second."""
        for client in list(self._clients):
            client.on_time(now)

    def close(self) -> None:
        """Drops everyone and removes the sockets."""
        for client in list(self._clients):
            client.close()
        for listener in self.listeners:
            listener.close()

    def _listening(self, root: Path, role: Role) -> UnixListener:
        crowd = Crowd(MAX_CLIENTS, MAX_OF_ONE)

        def accepted(connection: socket.socket, peer: Peer) -> None:
            def left(client: ControlClient) -> None:
                crowd.leave(peer)
                self._clients.discard(client)
                self._trace_ended()

            client = ControlClient(
                self._loop,
                connection,
                peer,
                self._relay,
                self._worker,
                left,
                self._trace_began,
                self._trace_ended,
                self._turns,
                self._tracers,
                may_change=role is ADMIN,
            )
            self._clients.add(client)

        return UnixListener(self._loop, root, role, socket.SOCK_STREAM, accepted, error_line, crowd)

    def _trace_began(self) -> None:
        self._tell_relay()
        self._look()

    def _trace_ended(self) -> None:
        """What was withdrawn for it may be offloaded again after a while.

        That can take a change of rules, and a client may begin and end traces without pause.
        """
        self._look()
        if self._ending is None or not self._ending.pending:
            self._ending = self._loop.call_at(self._loop.now + END_AFTER, self._tell_relay)

    def _tell_relay(self) -> None:
        """Tracing moves the selected flows to the slow path: only there packets can be shown.

        A flow may come into the wanted state yet, so all states are selected.
        """
        filters = [each.tracing.filter for each in self._clients if each.tracing is not None]
        self._relay.traced([each.in_any_state for each in filters])

    def _look(self) -> None:
        """Packets are shown only while there is a trace, and only those that it wants."""
        tracers = [client for client in self._clients if client.tracing is not None]
        wanted = {
            verdict for client in tracers if client.tracing for verdict in client.tracing.verdicts
        }
        worker = self._worker

        def rewritten(rewrite: Rewrite, before: bytes, after: bytes) -> None:
            for client in tracers:
                client.saw_rewritten(rewrite, before, after)

        def untouched(packet: bytes, hook: int, verdict: Verdict, reason: str) -> None:
            if WORDS[verdict] not in wanted:
                return
            from_server = worker.policy is not None and packet[12:16] in worker.policy.backends
            answers = tuple(worker.answers)
            what = Untouched(packet, hook, verdict, reason, answers, from_server)
            for client in tracers:
                client.saw_untouched(what)

        worker.on_rewrite = rewritten if REWRITE in wanted else None
        worker.on_untouched = untouched if wanted - {REWRITE} else None
