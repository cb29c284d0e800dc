"""A session on real sockets of the loopback, all four ends in this process.

The loop is turned by hand where it matters.
"""

import errno
import logging
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from tcp_relay.engine.engine import Engine
from tcp_relay.engine.legs import Legs
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.session import End
from tcp_relay.engine.sockets import server_socket, set_options
from tests.tcp_relay.helpers import (
    BOUND,
    LOCALHOST,
    fill,
    run_for,
    run_until,
    turns,
)

LONG = SessionLimits(hold=65536, stall=60.0, half_close=60.0, connect=60.0)


class Owner:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.legs: Legs | None = None  # a circle, as real owners have it

    def connected(self) -> None:
        self.told.append("connected")

    def connect_failed(self, error: int) -> None:
        self.told.append(errno.errorcode[error])

    def ended(self) -> None:
        self.told.append("ended")

    def names(self) -> Mapping[str, object]:
        return {"client": "10.0.0.1:40000", "server": None}


class Log(logging.Handler):
    """How connections ended, in words."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.details: list[str | None] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields: dict[str, Any] = record.fields  # type: ignore[attr-defined]
        if "reason" in fields:
            self.details.append(fields["detail"])


class Rig:
    """client - pump - server, all four ends in this process.

    `small`: the peers and the pump's sockets have the smallest buffers that there are.
    """

    def __init__(self, engine: Engine, small: bool = False, connect: bool = True) -> None:
        self.engine = engine
        self.loop = engine.loop
        self.owner = Owner()
        with socket.socket() as listening:
            if small:
                for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                    listening.setsockopt(socket.SOL_SOCKET, option, 4096)
            listening.bind((LOCALHOST, 0))
            listening.listen()
            self.client = socket.socket()
            if small:
                for option in (socket.SO_RCVBUF, socket.SO_SNDBUF):
                    self.client.setsockopt(socket.SOL_SOCKET, option, 4096)
            self.client.settimeout(BOUND)
            self.client.connect(listening.getsockname())
            accepted, _ = listening.accept()
            set_options(accepted)
            accepted.setblocking(False)
            self.legs = self.owner.legs = Legs(engine, self.owner, accepted)
            if connect:
                server = server_socket()
                if small:
                    server.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
                self.legs.use_server(server)
                self.legs.connect(listening.getsockname())
                self.server, _ = listening.accept()
                self.server.settimeout(BOUND)

    def __enter__(self) -> "Rig":
        return self

    def __exit__(self, *_: object) -> None:
        self.legs.end(End.KILLED)
        self.client.close()
        if hasattr(self, "server"):
            self.server.close()

    def connected(self) -> "Rig":
        self.run_until(lambda: self.legs.is_connected)
        turns(self.loop, 3)
        return self

    def run_until(self, condition: Callable[[], bool]) -> None:
        run_until(self.loop, condition)

    def flood(self, source: socket.socket) -> int:
        """Until nothing goes in at one end, because nobody reads at the other; how much went."""
        channel = self.legs.session.up if source is self.client else self.legs.session.down
        sent, still = 0, 0
        deadline = time.monotonic() + BOUND
        while still < 5:
            assert time.monotonic() < deadline
            more = fill(source)
            sent += more
            still = 0 if more else still + 1
            run_for(self.loop, 0.005)
        assert channel.held
        return sent

    def ended(self) -> list[End]:
        """How connections ended, in any order."""
        return [end for end, count in self.engine.counts.ends.items() for _ in range(count)]


def meets_a_reset(sock: socket.socket) -> bool:
    """Whether one that has read an end of file was reset: reading doesn't tell any more."""
    try:
        sock.send(b"x")
    except BrokenPipeError:
        return True
    return False
