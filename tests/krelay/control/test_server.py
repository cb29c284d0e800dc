"""The control socket between a loop and clients of every temper; the daemon is made up."""

import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from stat import S_IMODE
from typing import Any

import pytest

from knet.endpoint import Source
from knet.loop import Loop
from knet.unixsock import Peer
from krelay.control.clients import CAPTURE_BUFFER, CHUNK, IDLE, TRACE_BUFFER
from krelay.control.commands import HELP, MAX_LINE, VIEW_HELP
from krelay.control.server import (
    END_AFTER,
    MAX_CLIENTS,
    MAX_OF_ONE,
    MAX_TRACERS_OF_ONE,
    ControlSocket,
)
from krelay.control.views import Values
from krelay.datapath.verdict import Verdict
from krelay.datapath.worker import Worker
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.steps import Hook, Step
from krelay.trace.lines import Filter
from tests.tools.captures import slow_read
from tests.tools.packets import at, policy, template

FLOWS = 20_000
HELP_ANSWER = "".join(f"{line}\n" for line in (*HELP, "")).encode()
TOO_LONG = f"error: a line has at most {MAX_LINE} bytes\n\n".encode()
SYN = template("C:40000 > K:80 [S]").build()
REWRITTEN = template("C:40000 > K:16000 [S]").build()
SYN_LINE = b"T1 10.0.0.1:40000 > 192.168.0.2:80 [S] => > 192.168.0.2:16000 flow 1\n"
DROP_LINE = b"drop recovering 10.0.0.1:40000 > 192.168.0.2:80 [S]\n"
PASS_LINE = b"pass no_flow 10.0.0.1:40000 > 192.168.0.2:80 [S]\n"


class ManyRows(NatTable):
    """A table whose first flow is there many times, and that tells how often it was looked at."""

    times = 1
    taken = 0

    def __iter__(self) -> Iterator[Flow]:
        for flow in super().__iter__():
            for _ in range(self.times):
                self.taken += 1
                yield flow


@dataclass
class FakeRelay:
    """What the daemon is to the control socket."""

    nat: NatTable
    told: int = 0
    """How often it heard of traces."""

    def counted(self, flows: Iterable[Flow]) -> Iterator[Flow]:
        return iter(flows)

    def traced(self, filters: Sequence[Filter]) -> None:
        self.told += 1

    def status(self) -> Values:
        return {"state": "running"}

    def counters(self) -> Values:
        return {"T1": 1}

    def config_in_force(self) -> Values:
        return {"start": "1"}

    def flush(self) -> int:
        return 0

    def kill(self, flow: Flow) -> None:
        self.nat.end(flow)


class World:
    """A control socket, its clients, and the turns of the loop between them."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "control.sock"
        self.loop = Loop()
        self.nat = ManyRows(rng=Random(1))
        self.relay = FakeRelay(self.nat)
        self.worker = Worker(self.nat)
        self.flow = self.nat.open_tcp(
            at("C:40000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, self.loop.now
        )
        self.control = ControlSocket(self.loop, directory, self.relay, self.worker)
        self.clients: list[socket.socket] = []

    def close(self) -> None:
        self.control.close()
        self.loop.close()
        for client in self.clients:
            client.close()

    def turn(self) -> None:
        """One turn, with what is ready now."""
        self.loop.call_soon(lambda: self.loop.call_soon(self.loop.stop))
        self.loop.run()

    def connect(self, name: str = "control.sock") -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        self.clients.append(client)
        client.connect(str(self.path.parent / name))
        client.setblocking(False)
        self.turn()
        return client

    def ask(self, request: bytes, name: str = "control.sock") -> socket.socket:
        """A client that has said this, and been heard."""
        client = self.connect(name)
        client.sendall(request)
        self.turn()
        return client

    def leave(self, client: socket.socket) -> None:
        """It closes, and the loop has noticed."""
        client.close()
        self.turn()
        self.turn()

    def read(self, client: socket.socket) -> tuple[bytes, bool]:
        """All that comes to it, and whether the other side has hung up."""
        got = b""
        for _ in range(10_000):
            try:
                data = client.recv(1 << 16)
            except BlockingIOError:
                self.turn()
                try:
                    data = client.recv(1 << 16)
                except BlockingIOError:
                    return got, False
            except ConnectionResetError:
                return got, True
            if not data:
                return got, True
            got += data
        raise AssertionError("it never ends")

    def traced(self, times: int = 1) -> None:
        """So many packets are rewritten."""
        for _ in range(times):
            assert self.worker.on_rewrite is not None
            self.worker.on_rewrite(self.flow.rewrites[Step.T1], SYN, REWRITTEN)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(
        "krelay.control.turns.BUSY", 60.0
    )  # the machine's other work is none of ours
    world = World(tmp_path)
    yield world
    world.close()


def taken(client: socket.socket) -> bytes:
    """What the kernel holds for this client, without giving the loop a turn."""
    got = b""
    while True:
        try:
            got += client.recv(1 << 20)
        except BlockingIOError:
            return got


# requests and answers


def test_several_requests_in_one_packet_are_answered_in_order(world: World) -> None:
    client = world.ask(b"show status\nfly\nhelp\n")

    assert world.read(client) == (
        b"state=running\n\nerror: 'fly' is no command; try help\n\n" + HELP_ANSWER,
        False,
    )


def test_a_request_in_two_packets_is_answered_when_it_is_whole(world: World) -> None:
    client = world.ask(b"show ")
    assert world.read(client) == (b"", False)
    client.sendall(b"status\nhel")

    assert world.read(client) == (b"state=running\n\n", False)


def test_the_last_request_may_lack_its_newline_and_is_still_answered_after_a_half_close(
    world: World,
) -> None:
    client = world.ask(b"show status\nshow counters")
    client.shutdown(socket.SHUT_WR)

    assert world.read(client) == (b"state=running\n\nT1=1\n\n", True)


def test_a_half_close_without_a_request_is_a_goodbye(world: World) -> None:
    client = world.ask(b"")
    client.shutdown(socket.SHUT_WR)

    assert world.read(client) == (b"", True)


def test_an_answer_without_lines_is_the_empty_line(world: World) -> None:
    assert world.read(world.ask(b"show nat proto=udp\n")) == (b"\n", False)


@pytest.mark.parametrize("newline", [b"", b"\n"])
def test_a_line_of_4097_bytes_is_an_error_and_the_end(world: World, newline: bytes) -> None:
    client = world.ask(b"help\n" + b"x" * (MAX_LINE + 1) + newline + b"help\n" * bool(newline))

    assert world.read(client) == (HELP_ANSWER + TOO_LONG, True)


def test_a_line_of_4096_bytes_is_heard(world: World) -> None:
    client = world.ask(b"help".ljust(MAX_LINE) + b"\n")

    assert world.read(client) == (HELP_ANSWER, False)


def test_20_000_flows_are_made_only_as_fast_as_they_are_read(world: World) -> None:
    nat = world.nat
    nat.times = FLOWS
    client = world.ask(b"show nat\n")
    for _ in range(10):
        world.turn()
    made = nat.taken
    first = taken(client)
    line = len(first.partition(b"\n")[0]) + 1

    assert made < FLOWS
    assert made * line <= len(first) + CHUNK + 2 * line
    rest, ended = world.read(client)
    lines = (first + rest).split(b"\n")
    assert len(lines) == FLOWS + 2
    assert all(line.startswith(b"id=1 proto=tcp state=opening ") for line in lines[:-2])
    assert lines[-2:] == [b"", b""]
    assert not ended


def test_a_client_that_reads_slowly_holds_up_no_other(world: World) -> None:
    world.nat.times = FLOWS
    slow = world.ask(b"show nat\n")

    assert world.read(world.ask(b"show status\n")) == (b"state=running\n\n", False)
    slow.sendall(b"help\n")
    assert world.read(slow)[0].endswith(b"\n\n" + HELP_ANSWER)


def test_a_client_that_leaves_in_the_middle_of_its_answer_is_let_go(world: World) -> None:
    world.nat.times = FLOWS
    world.ask(b"show nat\n").close()
    world.turn()

    assert world.read(world.ask(b"show status\n")) == (b"state=running\n\n", False)
    assert world.nat.taken < FLOWS


# who may stay


def test_who_says_nothing_is_dropped_after_a_minute_and_not_before(world: World) -> None:
    client = world.connect()
    began = world.loop.now
    world.control.on_time(began + IDLE - 0.01)
    assert world.read(client) == (b"", False)
    world.control.on_time(began + IDLE + 0.01)

    assert world.read(client) == (b"", True)


def test_what_a_client_says_begins_its_minute_again(world: World) -> None:
    client = world.connect()
    began = world.loop.now
    client.sendall(b"sho")
    world.turn()
    heard = world.loop.now
    assert heard > began
    world.control.on_time(heard + IDLE - 1e-6)
    assert world.read(client) == (b"", False)
    world.control.on_time(heard + IDLE + 1e-6)

    assert world.read(client) == (b"", True)


def test_who_does_not_read_its_answer_is_dropped_after_a_minute(world: World) -> None:
    world.nat.times = FLOWS
    client = world.ask(b"show nat\n")
    world.control.on_time(world.loop.now + IDLE + 0.01)

    assert world.read(client)[1]
    assert world.nat.taken < FLOWS


def test_who_traces_may_wait_for_hours_but_has_to_read(world: World) -> None:
    client = world.ask(b"trace\n")
    world.loop.now += 10 * IDLE
    world.control.on_time(world.loop.now)
    world.traced()
    world.control.on_time(world.loop.now)  # in the same turn, before anything is sent
    assert world.read(client) == (SYN_LINE, False)

    world.traced(20_000)
    world.turn()
    world.control.on_time(world.loop.now + IDLE - 5)
    assert world.worker.on_rewrite is not None
    world.control.on_time(world.loop.now + IDLE + 0.01)
    assert world.worker.on_rewrite is None
    assert world.read(client)[1]


def test_a_client_too_many_is_hung_up_on_until_another_has_left(world: World) -> None:
    clients = [world.connect() for _ in range(MAX_CLIENTS)]
    told, ended = world.read(world.connect())
    assert (told.split(b";")[0], ended) == (
        b"error: there are too many connections to control.sock",
        True,
    )
    world.leave(clients[0])
    again = world.ask(b"show status\n")

    assert world.read(again) == (b"state=running\n\n", False)
    clients[-1].sendall(b"show counters\n")
    assert world.read(clients[-1]) == (b"T1=1\n\n", False)


# view.sock


@pytest.mark.parametrize(
    ("request_line", "what"),
    [
        (b"kill 1\n", b"kill"),
        (b"  kill   1 \n", b"kill"),
        (b"kill\n", b"kill"),
        (b"flush\n", b"flush"),
        (b"flush now\n", b"flush"),
        (b"trace pcap\n", b"trace pcap"),
        (b"trace proto=tcp pcap verdict=drop\n", b"trace pcap"),
    ],
)
def test_who_may_only_look_is_told_where_the_rest_is(
    world: World, request_line: bytes, what: bytes
) -> None:
    answer, ended = world.read(world.ask(request_line, "view.sock"))

    assert answer.startswith(b"error: " + what + b" isn't for view.sock")
    assert b"the group krelay-admin" in answer
    assert not ended
    assert len(world.nat) == 1
    assert world.worker.on_rewrite is None


def test_who_may_only_look_sees_the_rest(world: World) -> None:
    for request in (b"show nat\n", b"show status\n", b"show counters json\n", b"show config\n"):
        assert any(
            world.read(world.ask(request)) == world.read(world.ask(request, "view.sock"))
            for _ in range(10)  # a flow's age may go on between the two
        )
    help_, _ = world.read(world.ask(b"help\n", "view.sock"))
    assert help_ == "".join(f"{line}\n" for line in (*VIEW_HELP, "")).encode()
    assert not any(word in help_ for word in (b"kill", b"flush", b"pcap"))
    tracer = world.ask(b"trace\n", "view.sock")
    world.traced()
    assert world.read(tracer) == (SYN_LINE, False)


def test_both_sockets_go_with_their_owner(world: World) -> None:
    view = world.path.parent / "view.sock"
    assert view.exists()
    client = world.connect("view.sock")
    world.control.close()
    assert not view.exists()
    assert world.read(client) == (b"", True)
    world.control = ControlSocket(world.loop, world.path.parent, world.relay, world.worker)


# crowds


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> list[Peer]:
    """Who connects next, before root does; the groups are there."""
    coming: list[Peer] = []
    monkeypatch.setattr("knet.unixsock._peer", lambda _: coming.pop(0) if coming else ROOT)
    monkeypatch.setattr(Peer, "may_connect", lambda *_: True)
    return coming


ROOT = Peer(1, 0, 0)


@pytest.mark.parametrize("name", ["control.sock", "view.sock"])
def test_members_who_connect_as_often_as_they_can_keep_nobody_out(
    world: World, users: list[Peer], name: str
) -> None:
    users += [Peer(1, 1000, 1000)] * MAX_CLIENTS
    clients = [world.connect(name) for _ in range(MAX_CLIENTS)]
    users.append(Peer(2, 1001, 1001))
    other = world.ask(b"show status\n", name)
    root = world.ask(b"show status\n", name)

    assert world.read(other) == world.read(root) == (b"state=running\n\n", False)
    ended = [world.read(client) for client in clients]
    assert sum(end for _, end in ended) == MAX_CLIENTS - MAX_OF_ONE
    assert {said[:32] for said, end in ended if end} == {b"error: there are too many connec"}


def test_many_members_together_do_not_keep_root_out(world: World, users: list[Peer]) -> None:
    users += [Peer(1, 1000 + number % 10, 1000) for number in range(MAX_CLIENTS + 20)]
    for _ in range(MAX_CLIENTS + 20):
        world.connect()
    assert world.read(world.ask(b"show status\n")) == (b"state=running\n\n", False)


def test_a_member_who_traces_as_often_as_he_can_keeps_nobody_from_tracing(
    world: World, users: list[Peer]
) -> None:
    users += [Peer(1, 1000, 1000)] * MAX_OF_ONE
    clients = [
        world.ask(b"trace\n", "view.sock" if number % 2 else "control.sock")
        for number in range(MAX_OF_ONE)
    ]
    told = [world.read(client)[0] for client in clients]
    assert told == [b""] * MAX_TRACERS_OF_ONE + [
        b"error: there are too many traces; a user has at most 4: end some\n\n"
    ] * (MAX_OF_ONE - MAX_TRACERS_OF_ONE)
    root = world.ask(b"trace\n")
    world.traced()
    assert world.read(root) == (SYN_LINE, False)
    for client in clients:
        world.leave(client)
    users.append(Peer(1, 1000, 1000))
    again = world.ask(b"trace\n")
    world.traced()
    assert world.read(again) == (SYN_LINE, False)


def test_traces_that_end_without_pause_are_told_together(world: World) -> None:
    """Each may take a change of rules."""
    tracers = [world.ask(b"trace\n") for _ in range(20)]
    assert world.relay.told == 20
    for tracer in tracers:
        world.leave(tracer)
    assert world.worker.on_rewrite is None
    assert world.relay.told <= 21
    world.loop.call_at(world.loop.now + END_AFTER, world.loop.stop)
    world.loop.run()
    assert 21 <= world.relay.told <= 22


def test_in_a_turn_one_piece_of_one_answer_is_made_and_roots_first(
    world: World, users: list[Peer]
) -> None:
    world.nat.times = FLOWS
    users += [Peer(1, 1000 + number, 1000) for number in range(8)]
    members = [world.ask(b"show nat\n" * 50) for _ in range(8)]
    world.nat.taken = 0
    for _ in range(4):
        world.turn()  # two turns of the loop each, and nobody reads more than the kernel holds
    line = 150
    assert world.nat.taken <= 9 * (CHUNK // line + 1)
    root = world.connect()
    root.sendall(b"show status\n")
    for _ in range(2):
        world.turn()
    assert taken(root) == b"state=running\n\n"
    for member in members:
        assert taken(member)


@pytest.mark.serial
def test_answers_wait_while_there_is_other_work(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that takes as long as it can get leaves three quarters of the time to packets."""
    monkeypatch.setattr("krelay.control.turns.BUSY", 0.0)
    world.nat.times = FLOWS
    client = world.ask(b"show nat\n")
    used = 0.0
    ended_at = time.monotonic() + 0.5
    make_more = type(next(iter(world.control._clients)))._make_more

    def timed(client: Any) -> None:
        nonlocal used
        before = time.thread_time()  # on a busy machine a piece may take any time
        make_more(client)
        used += time.thread_time() - before

    monkeypatch.setattr(type(next(iter(world.control._clients))), "_make_more", timed)
    while time.monotonic() < ended_at:
        world.turn()
        taken(client)
    assert 0 < used < 0.5 / 3


def test_root_does_not_wait_for_what_others_took(
    world: World, users: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece may have taken long because the machine had other work."""
    monkeypatch.setattr("krelay.control.turns.BUSY", 0.0)
    world.nat.times = FLOWS
    users.append(Peer(1, 1000, 1000))
    member = world.ask(b"show nat\n")
    turns = world.control._turns
    turns._took = 1000.0
    for _ in range(5):
        world.turn()
        taken(member)
    turns._took = 1000.0
    root = world.ask(b"show status\n")
    world.turn()
    assert taken(root) == b"state=running\n\n"


# traces


def test_packets_are_looked_at_only_while_somebody_traces(world: World) -> None:
    assert world.worker.on_rewrite is None
    one, two = world.ask(b"trace\n"), world.ask(b"trace proto=tcp\n")
    world.leave(one)
    assert world.worker.on_rewrite is not None
    world.traced()
    assert world.read(two) == (SYN_LINE, False)
    world.leave(two)

    assert world.worker.on_rewrite is None


def test_a_trace_shows_the_flows_of_its_filter_alone(world: World) -> None:
    tcp, udp = world.ask(b"trace service=tcp/80\n"), world.ask(b"trace proto=udp\n")
    world.traced()

    assert world.read(tcp) == (SYN_LINE, False)
    assert world.read(udp) == (b"", False)


def test_who_traces_has_nothing_more_to_ask(world: World) -> None:
    client = world.ask(b"trace\nhelp\n")
    client.sendall(b"help\n" * 3000)
    world.traced()

    assert world.read(client) == (SYN_LINE, False)


def test_a_trace_goes_on_after_a_half_close(world: World) -> None:
    client = world.ask(b"trace")
    client.shutdown(socket.SHUT_WR)
    world.turn()
    world.traced()

    assert world.read(client) == (SYN_LINE, False)


def test_a_trace_that_is_not_read_is_bounded_and_its_loss_is_told(world: World) -> None:
    client = world.ask(b"trace\n")
    times = 3 * TRACE_BUFFER // len(SYN_LINE)
    world.traced(times)
    shown, ended = world.read(client)
    lines = shown.count(b"\n") - 1
    lost = f"lost {times - lines} lines: the reader is too slow\n".encode()

    assert shown == SYN_LINE * lines + lost
    assert TRACE_BUFFER < len(SYN_LINE) * lines <= TRACE_BUFFER + len(SYN_LINE)
    assert world.worker.counts.trace_lost == times - lines
    assert not ended
    world.traced(2)
    assert world.read(client) == (SYN_LINE * 2, False)


def test_packets_that_were_not_rewritten_are_shown_as_far_as_they_are_asked_for(
    world: World,
) -> None:
    for asked, expected in (
        (b"trace", SYN_LINE + DROP_LINE),
        (b"trace verdict=rewrite", SYN_LINE),
        (b"trace verdict=drop", DROP_LINE),
        (b"trace verdict=pass", PASS_LINE),
        (b"trace verdict=rewrite,drop,pass", SYN_LINE + DROP_LINE + PASS_LINE),
        (b"trace proto=tcp client=10.0.0.1", SYN_LINE + DROP_LINE),
        (b"trace proto=udp", b""),
        (b"trace state=opening", SYN_LINE),
        (b"trace verdict=drop client=10.0.0.9", b""),
    ):
        client = world.ask(asked + b"\n")
        if world.worker.on_rewrite is not None:
            world.traced()
        if world.worker.on_untouched is not None:
            world.worker.on_untouched(SYN, Hook.PREROUTING, Verdict.DROP, "recovering")
            world.worker.on_untouched(SYN, Hook.PREROUTING, Verdict.PASS, "no_flow")
        assert (asked, world.read(client)) == (asked, (expected, False))
        world.leave(client)


def test_nothing_is_looked_at_that_nobody_wants_to_see(world: World) -> None:
    worker = world.worker
    drops = world.ask(b"trace verdict=drop\n")
    assert (worker.on_rewrite, worker.on_untouched is None) == (None, False)
    rewrites = world.ask(b"trace verdict=rewrite\n")
    world.leave(drops)
    assert (worker.on_rewrite is None, worker.on_untouched) == (False, None)
    world.leave(rewrites)
    assert (worker.on_rewrite, worker.on_untouched) == (None, None)


def test_what_a_packet_was_answered_with_is_shown(world: World) -> None:
    client = world.ask(b"trace\n")
    world.worker.policy = policy()
    world.worker.handle(template("D:5000 > K:16000 [S]").build(), Hook.PREROUTING, 0.0)

    assert world.read(client) == (
        b"drop gateway_port 10.0.0.9:5000 > 192.168.0.2:16000 [S] answered [R.]\n",
        False,
    )


# captures


def test_a_capture_is_a_file_that_grows_and_ends_with_a_half_close(world: World) -> None:
    client = world.ask(b"trace pcap service=tcp/80\n")
    shown, ended = world.read(client)
    assert [block.kind for block in slow_read(shown)] == ["section", *["interface"] * 3]
    assert slow_read(shown)[0].comments == ["trace pcap service=tcp/80"]
    world.traced()
    more, ended = world.read(client)
    assert not ended
    blocks = slow_read(shown + more)
    assert [block.data for block in blocks if block.kind == "packet"] == [SYN, REWRITTEN]
    client.shutdown(socket.SHUT_WR)
    world.turn()
    assert (world.worker.on_rewrite, world.worker.on_untouched) == (None, None)
    rest, ended = world.read(client)

    assert ended
    assert [block.kind for block in slow_read(shown + more + rest)][-3:] == ["statistics"] * 3


def test_a_capture_may_end_as_soon_as_it_is_asked_for(world: World) -> None:
    client = world.connect()
    client.sendall(b"trace pcap")
    client.shutdown(socket.SHUT_WR)
    world.turn()
    shown, ended = world.read(client)

    assert ended
    kinds = [block.kind for block in slow_read(shown)]
    assert kinds == ["section", *["interface"] * 3, *["statistics"] * 3]
    assert world.worker.on_rewrite is None


def test_a_capture_that_is_not_read_is_bounded_and_its_loss_stands_in_it(world: World) -> None:
    client = world.ask(b"trace pcap\n")
    big = template("C:40000 > K:80 [P.]", payload=bytes(1400)).build()
    rewritten = template("C:40000 > K:16000 [P.]", payload=bytes(1400)).build()
    assert world.worker.on_rewrite is not None
    for _ in range(4 * CAPTURE_BUFFER // len(big)):
        world.worker.on_rewrite(world.flow.rewrites[Step.T1], big, rewritten)
    [held] = [len(one._out) for one in world.control._clients]
    lost = world.worker.counts.trace_lost
    assert CAPTURE_BUFFER < held <= CAPTURE_BUFFER + 2 * (len(big) + 200)
    world.turn()
    world.turn()
    world.traced()
    assert world.worker.counts.trace_lost == lost, "there is room again"
    client.shutdown(socket.SHUT_WR)
    blocks = slow_read(world.read(client)[0])

    packets = [block for block in blocks if block.kind == "packet"]
    assert len(packets) / 2 + lost == 4 * CAPTURE_BUFFER // len(big) + 1
    told = [block for block in packets if "dropcount" in block.numbers]
    assert [block.numbers["dropcount"] for block in told] == [lost, lost]
    assert [block.data for block in told] == [SYN, REWRITTEN]
    statistics = [block.numbers for block in blocks if block.kind == "statistics"]
    assert [numbers["ifdrop"] for numbers in statistics] == [lost, lost, 0]
    assert [numbers["ifrecv"] for numbers in statistics] == [len(packets) / 2 + lost] * 2 + [0]


def test_who_does_not_read_a_capture_is_dropped_after_a_minute(world: World) -> None:
    world.ask(b"trace pcap\n")
    for _ in range(4):  # more than the kernel takes
        world.traced(CAPTURE_BUFFER // 200)
        world.turn()
    world.control.on_time(world.loop.now + IDLE + 0.01)

    assert world.worker.on_rewrite is None


def test_a_tracer_that_leaves_while_a_packet_is_told_disturbs_nothing(world: World) -> None:
    client = world.ask(b"trace\n")
    client.close()
    world.traced()
    world.turn()

    assert world.worker.on_rewrite is None
    assert world.read(world.ask(b"show status\n")) == (b"state=running\n\n", False)


# the file


def test_the_socket_is_for_root_and_the_group_alone_and_goes_with_its_owner(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert S_IMODE(os.stat(world.path).st_mode) & 0o117 == 0
    client = world.connect()
    world.control.close()

    assert not world.path.exists()
    assert world.read(client) == (b"", True)
    monkeypatch.setattr("knet.unixsock.group_id", lambda _: None)
    world.control = ControlSocket(world.loop, world.path.parent, world.relay, world.worker)
    assert S_IMODE(os.stat(world.path).st_mode) == 0o600


def test_closing_with_a_tracer_takes_the_trace_off(world: World) -> None:
    client = world.ask(b"trace\n")
    world.control.close()

    assert world.worker.on_rewrite is None
    assert world.read(client) == (b"", True)
    world.control = ControlSocket(world.loop, world.path.parent, world.relay, world.worker)
