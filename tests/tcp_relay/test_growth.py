"""An hour of tcp-relay, and one of tcpproxy, with all that may happen: nothing is left of it."""

import os
import socket
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from unittest import mock

import pytest

from knet.endpoint import Endpoint, Source
from knet.loop import Loop
from krelay.registration.messages import (
    PORT_TAKEN,
    Abort,
    Open,
    Opened,
    Refused,
    Resume,
    Resumed,
    emit,
    parse_request,
)
from procfs_sim import FileTree
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.listener import Listener
from tcp_relay.engine.session import End
from tcp_relay.proxy.proxy import Proxy
from tcp_relay.proxy.resolver import Address, Answer, Resolver
from tcp_relay.relay.daemon import TcpRelayDaemon
from tests.tcp_relay.helpers import LOCALHOST, free_port
from tests.tools.hours import every, garbage, run_for, simulated

HOUR = 3600
Answered = Opened | Refused | Abort | Resumed
LIMITS = SessionLimits(stall=5.0, half_close=20.0, connect=5.0, hold=4096)


class Server:
    """A server on the same loop: it answers some, ends some, resets some, and forgets the rest."""

    def __init__(self, loop: Loop, rng: Random) -> None:
        self.socket = socket.create_server((LOCALHOST, 0), backlog=64)
        self.socket.setblocking(False)
        self.endpoint = Endpoint.of(*self.socket.getsockname())
        self._rng = rng
        self._open: list[socket.socket] = []
        every(loop, 0.5, self._serve)

    def close(self) -> None:
        for each in (self.socket, *self._open):
            each.close()

    def _serve(self) -> None:
        with suppress(BlockingIOError):
            while True:
                self._open.append(self.socket.accept()[0])
        for connection in self._open:
            connection.setblocking(False)
            with suppress(OSError):
                connection.send(connection.recv(1 << 16) * self._rng.choice((0, 1, 100)))
        if len(self._open) > 5:
            leave(self._open.pop(0), self._rng)


def leave(sock: socket.socket, rng: Random) -> None:
    """Ends a connection in one of the ways there are."""
    with suppress(OSError):
        if rng.random() < 0.3:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        elif rng.random() < 0.3:
            sock.shutdown(socket.SHUT_WR)
    sock.close()


class Clients:
    """One more every five seconds, to one of these ports; each stays for a while."""

    def __init__(self, loop: Loop, rng: Random, ports: Callable[[], int]) -> None:
        self._rng = rng
        self._ports = ports
        self._open: list[socket.socket] = []
        self.events: Counter[str] = Counter()
        every(loop, 5, self._come)
        every(loop, 1, self._talk)

    def close(self) -> None:
        for each in self._open:
            each.close()

    def _come(self) -> None:
        client = socket.socket()
        client.settimeout(1)
        try:
            client.connect((LOCALHOST, self._ports()))
        except OSError:
            client.close()
            return
        client.setblocking(False)
        self.events["connected"] += 1
        self._open.append(client)
        if len(self._open) > 4:
            leave(self._open.pop(self._rng.randrange(3)), self._rng)

    def _talk(self) -> None:
        for client in self._open:
            with suppress(OSError):
                client.send(b"q" * self._rng.choice((1, 5000)))
            with suppress(OSError):
                if self._rng.random() < 0.7 and client.recv(1 << 16):
                    self.events["answer"] += 1


class Krelay:
    """A krelay on the same loop: refuses some, falls silent, sends malformed messages, goes."""

    def __init__(self, loop: Loop, root: Path, server: Endpoint, rng: Random) -> None:
        self._path = root / "relay.sock"
        self._server = server
        self._rng = rng
        self._listening: socket.socket | None = None
        self._peer: socket.socket | None = None
        self.events: Counter[str] = Counter()
        self._come()
        every(loop, 0.1, self._serve)
        every(loop, 300, self.close)
        every(loop, 310, self._come)

    def close(self) -> None:
        """It goes."""
        for each in (self._listening, self._peer):
            if each is not None:
                each.close()
        self._listening = self._peer = None

    def _come(self) -> None:
        if self._listening is None:
            self._path.unlink(missing_ok=True)
            self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            self._listening.setblocking(False)
            self._listening.bind(str(self._path))
            self._listening.listen()

    def _serve(self) -> None:
        if self._listening is None:
            return
        with suppress(BlockingIOError):
            self._peer, _ = self._listening.accept()
            self._peer.setblocking(False)
        if self._peer is None:
            return
        try:
            while packet := self._peer.recv(4096):
                self._answer(packet)
        except BlockingIOError:
            return
        except ConnectionResetError:
            pass
        self._peer.close()
        self._peer = None

    def _answer(self, packet: bytes) -> None:
        assert self._peer is not None
        answers: tuple[Answered, ...]
        match parse_request(packet):
            case Open(id=number, relay=relay):
                answers = (
                    *[Opened(number, self._server, Source.CLIENT)] * 6,
                    Refused(number, "no row for this client"),
                    Refused(number, PORT_TAKEN),
                    Opened(number, Endpoint.of(LOCALHOST, 1), Source.RELAY),
                    Abort(relay),
                )
            case Resume(id=number):
                answers = (Resumed(number), Refused(number, "gone"))
            case _:
                return
        answer = self._rng.choice(answers)
        self.events[type(answer).__name__] += 1
        with suppress(OSError):
            self._peer.send(emit(answer) if self._rng.random() < 0.97 else b"nonsense")


def test_an_hour_of_tcp_relay_leaves_nothing_for_the_collector(tmp_path: Path) -> None:
    rng, ports = Random(1), (free_port(), free_port())
    FileTree(tmp_path).create()
    with simulated() as loop, ExitStack() as stack:
        server = stack.enter_context(closing(Server(loop, rng)))
        krelay = stack.enter_context(closing(Krelay(loop, tmp_path, server.endpoint, rng)))
        clients = stack.enter_context(closing(Clients(loop, rng, lambda: rng.choice(ports))))
        values = cycle((f"gport {ports[0]}", f"gport {ports[1]}", "gport abc", "real_ip 127.0.0.1"))

        def write() -> None:
            name, value = next(values).split()
            (tmp_path / name).write_text(value + "\n")

        every(loop, 50, write)
        write()
        daemon = TcpRelayDaemon(loop, tmp_path, LIMITS, lambda: None, 0, 1, follows_stall=False)
        run_for(loop, 60)
        left = garbage(lambda: run_for(loop, HOUR))

        assert left == {}
        assert min(krelay.events.values()) >= 1, krelay.events
        assert len(krelay.events) == 4
        assert clients.events["answer"] > 100
        ends = daemon._engine.counts.ends
        assert len([end for end, times in ends.items() if times]) >= 6, ends
        daemon._stop_accepting()
        daemon._engine.end_all(End.KILLED, "")
        daemon._relay.close()


@pytest.mark.parametrize("host", [LOCALHOST, "a.name.that.fails", "many.names"])
def test_an_hour_of_tcpproxy_leaves_nothing_for_the_collector(host: str) -> None:
    rng = Random(1)
    with simulated() as loop, ExitStack() as stack:
        server = stack.enter_context(closing(Server(loop, rng)))
        stack.enter_context(
            mock.patch("tcp_relay.proxy.resolver._Lookup", partial(FakeLookup, rng))
        )
        engine = Engine(loop, LIMITS)
        resolver = stack.enter_context(closing(Resolver(loop, host, server.endpoint.port)))
        proxy, port = Proxy(engine, resolver), free_port()
        listener = Listener(loop, port, proxy.accepted, address=LOCALHOST, spare=proxy.spare)
        engine.on_room = listener.resume
        clients = stack.enter_context(closing(Clients(loop, rng, lambda: port)))
        run_for(loop, 60)
        left = garbage(lambda: run_for(loop, HOUR))

        assert left == {}
        assert clients.events["connected"] > 500
        listener.close()
        engine.end_all(End.KILLED, "")


class FakeLookup:
    """A look-up without a thread: it finds the server, behind one that refuses, or nothing."""

    def __init__(self, rng: Random, host: str, port: int) -> None:
        found = [
            Address(socket.AF_INET, (LOCALHOST, 1)),
            Address(socket.AF_INET, (LOCALHOST, port)),
        ]
        fails = host.startswith("a.") and rng.random() < 0.7
        self.answer: Answer = OSError(f"{host}: no such name") if fails else found
        self.reader, writer = os.pipe()
        os.close(writer)
