"""Each system call that tcp-relay and tcpproxy make while they serve fails once: they go on.

As tests/net/test_failing_calls.py has it for krelay: the calls are those that the programs make
when these things happen; some of them fail, with one error each, all errors coming round; with
KRELAY_LONG=1 all of them, with each.  After each new clients are served, and one that was there
before still is.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from krelay.registration.messages import Open, Request
from tests.tcp_relay.fake_krelay import FakeKrelay, Reply, opened_to
from tests.tcp_relay.helpers import (
    LOCALHOST,
    Server,
    TcpProxy,
    TcpRelay,
    echo,
    exactly,
    free_port,
    reset,
    wait_for,
)
from tests.tools import faults
from tests.tools.faults import ERRORS, Call

LONG = bool(os.environ.get("KRELAY_LONG"))
MOST = 10
"""Calls of one happening that are made to fail, unless the test is a long one."""
MOST_TOLD = 4
"""Warnings that one failure may lead to: what failed, and what comes of it."""
HEALED_WITHIN = 15.0
"""Seconds after which all is well again: a client may wait for 5 for krelay, and come again."""
OPTIONS = ("--stall", "4", "--log-level", "warning")


@pytest.fixture(scope="module")
def strace() -> None:
    """Skips where no call can be made to fail."""
    if (reason := faults.why_not()) is not None:
        pytest.skip(reason)


class Rig:
    """A program that serves, and a client who has been there for long."""

    def __init__(self, stack: ExitStack, program: TcpRelay | TcpProxy) -> None:
        self.program = program
        self.krelay: FakeKrelay | None = None
        wait_for(self.is_well, "it to serve")
        self.old = stack.enter_context(self.dial())
        assert says(self.old)

    @property
    def port(self) -> int:
        return self.program.gport if isinstance(self.program, TcpRelay) else self.program.port

    def dial(self) -> socket.socket:
        return socket.create_connection((LOCALHOST, self.port), timeout=8)

    def is_well(self) -> bool:
        """Whether a new client is served."""
        assert self.program.process.poll() is None, self.program.log[-2000:]
        try:
            with self.dial() as client:
                return says(client)
        except OSError:
            return False


def says(client: socket.socket) -> bool:
    """Whether what it says comes back; an OSError says why not."""
    client.sendall(b"hello")
    return exactly(client, 5) == b"hello"


def a_client_comes(rig: Rig) -> None:
    with suppress(OSError, AssertionError), rig.dial() as client:
        client.settimeout(1)
        says(client)
        client.shutdown(socket.SHUT_WR)
        client.recv(1)


def a_client_resets(rig: Rig) -> None:
    with suppress(OSError, AssertionError), rig.dial() as client:
        client.settimeout(1)
        says(client)
        reset(client)


def much_is_sent(rig: Rig) -> None:
    with suppress(OSError, AssertionError), rig.dial() as client:
        client.settimeout(1)
        client.sendall(bytes(3_000_000))
        exactly(client, 3_000_000)


def a_client_rests(rig: Rig) -> None:
    with suppress(OSError, AssertionError), rig.dial() as client:
        client.settimeout(1)
        says(client)
        time.sleep(1.3)


def the_server_refuses(rig: Rig) -> None:
    assert rig.krelay is not None
    before = rig.krelay.reply

    def elsewhere(request: Request) -> Reply:
        if isinstance(request, Open):
            return opened_to(type(request.relay).of(LOCALHOST, 1), request)
        return before(request)

    rig.krelay.reply = elsewhere
    with suppress(OSError), rig.dial() as client:
        client.settimeout(1)
        client.recv(1)
    rig.krelay.reply = before


def the_gateway_port_changes(rig: Rig) -> None:
    assert isinstance(rig.program, TcpRelay)
    rig.program.gport = free_port()
    (rig.program.root / "gport").write_text(f"{rig.program.gport}\n")
    time.sleep(0.3)


def krelay_comes_again(rig: Rig) -> None:
    assert rig.krelay is not None
    rig.krelay.stop()
    time.sleep(0.15)
    rig.krelay.start()
    time.sleep(0.3)


Happens = Callable[[Rig], None]
OF_BOTH: list[Happens] = [a_client_comes, a_client_resets, much_is_sent, a_client_rests]
OF_TCP_RELAY: list[Happens] = [the_server_refuses, the_gateway_port_changes, krelay_comes_again]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(echo) as server:
        yield server


@pytest.fixture(scope="module")
def relayed(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Rig]:
    root = tmp_path_factory.mktemp("faults") / "tree"
    with ExitStack() as stack:
        program = stack.enter_context(TcpRelay(root, *OPTIONS))
        krelay = stack.enter_context(FakeKrelay(root, server.endpoint))
        rig = Rig(stack, program)
        rig.krelay = krelay
        yield rig


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Iterator[Rig]:
    at: Path = tmp_path_factory.mktemp("faults")
    with ExitStack() as stack:
        port = server.endpoint.port
        yield Rig(stack, stack.enter_context(TcpProxy(at, "localhost", port, *OPTIONS)))


def fail(rig: Rig, happens: Happens, call: Call, error: str) -> bool:
    """Has that call fail meanwhile; whether it did.  Then all must be well again."""
    before = len(rig.program.log)
    with faults.broken(rig.program.process.pid, call, error) as broke:
        happens(rig)
    wait_for(rig.is_well, f"all well after {call} {error}", HEALED_WITHIN)
    told = rig.program.log[before:].splitlines()
    assert len(told) <= MOST_TOLD, (call, error, told)
    assert len(set(map(_message, told))) == len(told), ("said twice", call, error, told)
    try:
        alive = says(rig.old)
    except (OSError, AssertionError) as lost:
        pytest.fail(f"after {call} {error} the client from before: {lost!r}; {told}")
    assert alive
    return broke() is not None


def _message(line: str) -> str:
    return line.partition(" ")[2].partition(" again=")[0]


def all_fail(rig: Rig, happens: Happens) -> None:
    happens(rig)
    table = faults.recorded(rig.program.process.pid, lambda: happens(rig))
    if not LONG and len(table) > MOST:
        table = [table[at * len(table) // MOST] for at in range(MOST)]
    hit = 0
    for number, call in enumerate(table):
        for error in ERRORS if LONG else ERRORS[number % len(ERRORS) :][:1]:
            hit += fail(rig, happens, call, error)
    assert hit >= len(table) / 2, "hardly anything has failed"


@pytest.mark.usefixtures("strace")
@pytest.mark.timeout(1800 if LONG else 240)
@pytest.mark.parametrize("happens", OF_BOTH + OF_TCP_RELAY, ids=lambda each: each.__name__)
def test_no_call_that_fails_ends_tcp_relay(relayed: Rig, happens: Happens) -> None:
    all_fail(relayed, happens)


@pytest.mark.usefixtures("strace")
@pytest.mark.timeout(1800 if LONG else 240)
@pytest.mark.parametrize("happens", OF_BOTH, ids=lambda each: each.__name__)
def test_no_call_that_fails_ends_tcpproxy(proxied: Rig, happens: Happens) -> None:
    all_fail(proxied, happens)
