"""start: 1, 0, 1, 0 ... while there is traffic, and the host as it was in between."""

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest

from tests.net.world import World, doubled, echo, greet

pytestmark = pytest.mark.net


class Traffic:
    """Clients that come and go, refused or cut off at times.  Wrong answers are kept."""

    def __init__(self, world: World) -> None:
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._world = world
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._repeat, args=(one,), daemon=True)
            for one in (self._tcp, self._tcp, self._long, self._udp)
        ]

    def begin(self) -> None:
        """Until `end`."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Waits for all clients."""
        self._ended.set()
        for thread in self._threads:
            thread.join(30)
            assert not thread.is_alive()

    def wait_for_more(self) -> None:
        """Waits until some more clients, of both protocols, got what they wanted."""
        wanted = {kind: self.outcomes[kind] + 2 for kind in ("_tcp fine", "_udp fine")}
        self._world.until(
            lambda: all(self.outcomes[kind] >= least for kind, least in wanted.items()),
            f"more clients served than {self.outcomes}",
        )

    def _repeat(self, one: Callable[[], None]) -> None:
        with self._world.lab.enter("client"):
            while not self._ended.wait(0.002):
                name = one.__name__
                try:
                    one()
                except TimeoutError:
                    self.outcomes[f"{name} unanswered"] += 1
                except (ConnectionError, AssertionError) as error:
                    self.outcomes[f"{name} {type(error).__name__}"] += 1
                else:
                    self.outcomes[f"{name} fine"] += 1

    def _is_client(self, seen: str) -> None:
        if not seen.startswith(f"{self._world.client}:"):
            self.wrong.append(seen)

    def _tcp(self) -> None:
        with socket.create_connection((self._world.relay, 80), 2) as sock:
            self._is_client(greet(sock))

    def _long(self) -> None:
        with socket.create_connection((self._world.relay, 80), 2) as sock:
            self._is_client(greet(sock))
            while not self._ended.wait(0.005):
                echo(sock, b"0123456789" * 100)

    def _udp(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.settimeout(0.1)
            sock.connect((self._world.relay, 7))
            sock.send(b"who")
            self._is_client(sock.recv(100).decode())


@contextmanager
def traffic(world: World) -> Iterator[Traffic]:
    """Clients at work for the duration of the block."""
    clients = Traffic(world)
    clients.begin()
    try:
        yield clients
    finally:
        clients.end()


def test_twenty_starts_and_stops_under_traffic_leave_no_rule_and_no_doubled_one(
    world: World,
) -> None:
    world.serve("server", "tcp/80", "udp/7")
    before = world.rules()
    world.begin()
    first = world.rules()
    with traffic(world) as clients:
        for number in range(20):
            world.put(start=0)
            world.until_state("stopped")
            assert world.rules() == before
            world.put(start=1)
            world.until_state("running")
            assert world.rules() == first
            if number % 4 == 0:
                clients.wait_for_more()

    assert clients.wrong == []
    assert clients.outcomes["_tcp fine"] >= 10
    assert clients.outcomes["_udp fine"] >= 10
    assert clients.outcomes["_long ConnectionResetError"] > 0  # each stop cuts it off
    assert not doubled(first)
    for program in (world.krelay_process, world.tcp_relay_process):
        assert program.poll() is None
        assert "Traceback" not in program.output
        assert " error " not in program.output
    assert world.who("client", 80).startswith(f"{world.client}:")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")


def _in_force(world: World, flag: str) -> bool:
    return f"start={flag}" in world.ask("show config")


def _is(world: World, state: str) -> bool:
    return f"state={state}" in world.ask("show status")


def test_flags_written_as_fast_as_a_shell_can_end_in_the_last_one(world: World) -> None:
    world.serve("server", "tcp/80")
    before = world.rules()
    world.begin()
    first = world.rules()
    script = 'for i in $(seq 100); do echo $((i % 2)) > "$1/start"; done; echo $2 > "$1/start"'
    for flag, rules, state in (("0", before, "stopped"), ("1", first, "running")):
        world.lab.run("relay", "sh", "-c", script, "sh", str(world.root), flag)
        # Asked, not read: the status files tell of one value after the other.
        world.until(partial(_in_force, world, flag), f"start={flag}")
        world.until(partial(_is, world, state), state)
        assert world.rules() == rules

    assert world.who("client", 80).startswith(f"{world.client}:")


def test_a_stop_cuts_connections_off(world: World) -> None:
    world.serve("server", "tcp/80")
    world.begin()
    idle = world.connect("client", 80)
    greet(idle)
    world.write("start", "0")

    with pytest.raises(ConnectionResetError):
        idle.recv(1)
    world.until(lambda: world.read("status/state") == "stopped", "stopped")
    assert world.flows() == []
    with pytest.raises(ConnectionRefusedError):
        world.connect("client", 80)
