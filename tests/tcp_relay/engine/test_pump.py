"""The pump on real sockets of the loopback: what moves, and what is left when a side is lost.

The loop is turned by hand where it matters, all four ends are in this process, and limits are
fractions of a second.  Lower bounds of time are exact, upper ones are generous.
"""

import socket
import time
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knet.loop import Loop
from tcp_relay.engine import legs
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.pump import SHORT, STEPS, Pump
from tcp_relay.engine.session import End
from tcp_relay.engine.sockets import undelivered
from tests.tcp_relay.engine.rig import LONG, Log, Rig, meets_a_reset
from tests.tcp_relay.helpers import (
    drain,
    everything,
    exactly,
    fill,
    reset,
    run_for,
    turns,
    was_reset,
)


class LongWay(Pump):
    """Never takes the short cut."""

    __slots__ = ()

    @property
    def _is_smooth(self) -> bool:
        return False

    @_is_smooth.setter
    def _is_smooth(self, _: bool) -> None:
        pass


# What moves.


def test_both_ends_of_file_end_it_in_order(rig: Rig) -> None:
    rig.client.sendall(b"question")
    rig.client.shutdown(socket.SHUT_WR)
    rig.server.sendall(b"answer")
    rig.server.shutdown(socket.SHUT_WR)
    rig.run_until(lambda: not rig.legs.alive)
    assert rig.owner.told == ["connected", "ended"]
    assert rig.ended() == [End.CLOSED]
    assert everything(rig.server) == b"question"
    assert everything(rig.client) == b"answer"
    assert rig.engine.counts.moved == [8, 6]


def test_a_stalled_sink_bounds_what_is_held_and_nothing_is_lost(rig: Rig) -> None:
    sent = rig.flood(rig.client)
    assert 0 < len(rig.legs.session.up.held) <= LONG.hold
    assert rig.engine.report()["held"] == rig.legs.session.held
    rig.client.shutdown(socket.SHUT_WR)
    received = 0

    def pull() -> bool:
        nonlocal received
        count, is_over = drain(rig.server)
        received += count
        return is_over

    rig.run_until(pull)
    assert received == sent
    assert rig.legs.session.held == 0


def test_what_a_full_sink_leaves_of_many_small_pieces_stays_in_order(loop: Loop) -> None:
    """The short cut meets a sink that takes a part, or nothing."""
    with Rig(Engine(loop, LONG), small=True).connected() as rig:
        rig.client.setblocking(False)
        sent = b""
        number = 0
        while not rig.legs.session.up.held:
            piece = b"%07d|" % number * 125
            number += 1
            sent += piece[: rig.client.send(piece)]
            turns(loop, 2)
        received = b""
        rig.server.setblocking(False)
        rig.client.shutdown(socket.SHUT_WR)
        is_over = False

        def pull() -> bool:
            nonlocal received, is_over
            try:
                data = rig.server.recv(65536)
            except BlockingIOError:
                return False
            received += data
            return not data

        rig.run_until(pull)
        assert received == sent


# The short cut.

SIZES = (1, 300, SHORT - 1, SHORT, SHORT + 1, 2 * SHORT, 40_000)
steps = st.tuples(
    st.sampled_from(["client", "server"]),
    st.sampled_from(["write", "write", "write", "urgent", "shutdown"]),
    st.sampled_from(SIZES),
)


def _played(script: list[tuple[str, str, int]]) -> list[object]:
    """What is known after each step, and what the peers got."""
    facts: list[object] = []
    with Loop() as loop, Rig(Engine(loop, LONG)).connected() as rig:
        ends = {"client": rig.client, "server": rig.server}
        for sock in ends.values():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        finished: set[str] = set()
        for who, act, size in script:
            if who in finished:
                continue
            if act == "write":
                ends[who].sendall(b"x" * size)
            elif act == "urgent":
                ends[who].send(b"!", socket.MSG_OOB)
            else:
                ends[who].shutdown(socket.SHUT_WR)
                finished.add(who)
            turns(loop, 4)
            facts.append([drain(sock) for sock in ends.values()])
            turns(loop, 2)
            session = rig.legs.session
            channels = [replace(channel, at=0.0) for channel in (session.up, session.down)]
            facts.append((channels, rig.legs.alive, list(rig.engine.counts.moved)))
    return facts


@settings(max_examples=60)
@given(script=st.lists(steps, max_size=10))
def test_the_short_cut_leaves_the_same_facts_as_the_long_way(
    script: list[tuple[str, str, int]],
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(legs, "Pump", LongWay)
        the_long_way = _played(script)
    assert _played(script) == the_long_way


def test_the_short_cut_is_taken(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above compares the long way with itself."""
    rig.connected()
    taken: list[int] = []
    real = Pump._short_cut

    def counted(self: Pump, *arguments: Any) -> None:
        taken.append(1)
        real(self, *arguments)

    monkeypatch.setattr(Pump, "_short_cut", counted)
    for source, sink in ((rig.client, rig.server), (rig.server, rig.client)):
        source.sendall(b"x" * 300)
        turns(rig.loop, 2)
        assert exactly(sink, 300) == b"x" * 300
    assert len(taken) == 2


# A fair share.


def test_a_turn_is_bounded(loop: Loop) -> None:
    limits = SessionLimits(hold=4096, stall=60.0)
    with Rig(Engine(loop, limits)).connected() as rig:
        assert fill(rig.client) > 20 * STEPS * limits.hold
        moved: list[int] = []
        for _ in range(10):
            turns(loop)
            moved.append(rig.legs.session.up.moved)
        assert moved[-1] > STEPS * limits.hold  # it goes on by itself
        # `turns` are two of the loop's, and each may have an event beside the queued turn.
        assert all(after - before <= 4 * STEPS * limits.hold for before, after in pairwise(moved))


def test_a_fast_connection_doesnt_starve_a_slow_one(loop: Loop) -> None:
    engine = Engine(loop, SessionLimits(hold=4096, stall=60.0))
    with Rig(engine).connected() as fast, Rig(engine).connected() as slow:
        left = fill(fast.client)
        for number in range(5):
            slow.client.sendall(b"%d" % number)
            turns(loop, 1)
            assert exactly(slow.server, 1) == b"%d" % number
        assert 0 < fast.legs.session.up.moved < left  # it was busy all the time


@pytest.mark.serial
@pytest.mark.parametrize("size", [1, 1000, 65535, 65536, 65537, 4 * 65536, 4 * 65536 + 1])
@pytest.mark.parametrize("is_last", [True, False])
def test_data_arrives_whole_and_at_once_with_an_end_of_file_behind_it_or_without(
    size: int, is_last: bool
) -> None:
    """A held back segment would wait for 200 ms, each time."""
    took = []
    for _ in range(5):
        with Loop() as loop, Rig(Engine(loop, LONG)) as rig:
            data = bytes(size)
            rig.client.sendall(data)
            if is_last:
                rig.client.shutdown(socket.SHUT_WR)
            begun = time.monotonic()
            received = 0

            def pull(rig: Rig = rig) -> bool:
                nonlocal received
                count, is_over = drain(rig.server)
                received += count
                return is_over or (not is_last and received >= size)

            rig.run_until(pull)
            took.append(time.monotonic() - begun)
            assert received == size
    assert min(took) < 0.15


def test_urgent_bytes_before_an_end_of_file_dont_hide_what_follows_them(loop: Loop) -> None:
    """A read stops at the mark, and is as short as one that meets the end."""
    with Rig(Engine(loop, LONG)) as rig:
        rig.server.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        rig.client.sendall(b"before")
        rig.client.send(b"!", socket.MSG_OOB)
        rig.client.sendall(b"after")
        rig.client.shutdown(socket.SHUT_WR)
        rig.run_until(lambda: rig.legs.session.up.sent_eof)
        assert everything(rig.server) == b"before!after"


@pytest.mark.parametrize("flooded", [False, True])
def test_an_urgent_byte_is_marked_again(loop: Loop, flooded: bool) -> None:
    with Rig(Engine(loop, LONG), small=True).connected() as rig:
        waiting = rig.flood(rig.client) if flooded else rig.client.send(b"before")
        rig.client.setblocking(False)
        rig.server.setblocking(False)
        left, is_sent = waiting, False

        def is_all_read() -> bool:
            nonlocal left, is_sent
            with suppress(BlockingIOError):
                is_sent = is_sent or rig.client.send(b"!", socket.MSG_OOB) == 1
            with suppress(BlockingIOError):
                left -= len(rig.server.recv(1 << 16))
            return is_sent and left <= 0

        rig.run_until(is_all_read)
        urgent = b""

        def is_there() -> bool:
            nonlocal urgent
            with suppress(OSError):
                urgent = rig.server.recv(1, socket.MSG_OOB)
            return bool(urgent)

        rig.run_until(is_there)
        assert (left, urgent) == (0, b"!")


# Losing a side.


@pytest.mark.parametrize("lost", ["client", "server"])
def test_after_a_read_error_what_is_held_is_delivered_and_then_a_reset(
    loop: Loop, log: Log, lost: str
) -> None:
    with Rig(Engine(loop, LONG), small=True).connected() as rig:
        source, sink = (rig.client, rig.server) if lost == "client" else (rig.server, rig.client)
        channel = rig.legs.session.up if lost == "client" else rig.legs.session.down
        source.setblocking(False)
        sent = 0
        while not channel.held:
            sent += source.send(b"x" * 500)
            turns(loop, 2)
        rig.run_until(lambda: not undelivered(source))
        reset(source)
        turns(loop, 3)
        assert rig.legs.alive  # held bytes are still to be delivered
        received, ending = 0, ""
        sink.setblocking(False)

        def pull() -> bool:
            nonlocal received, ending
            try:
                data = sink.recv(700)
            except BlockingIOError:
                return False
            except ConnectionResetError:
                ending = "reset"
                return True
            received += len(data)
            return not data

        rig.run_until(pull)
        assert (received, ending) == (sent, "reset")
        assert rig.ended() == [End.RESET]
        assert log.details == [f"{lost}: connection reset by peer"]


@pytest.mark.parametrize("lost", ["client", "server"])
def test_a_reset_is_passed_on_as_a_reset_before_any_byte(rig: Rig, lost: str) -> None:
    rig.connected()
    source, sink = (rig.client, rig.server) if lost == "client" else (rig.server, rig.client)
    reset(source)
    rig.run_until(lambda: not rig.legs.alive)
    assert was_reset(sink)
    assert rig.ended() == [End.RESET]


def test_a_reset_after_the_end_of_file_is_passed_on(rig: Rig) -> None:
    rig.connected()
    rig.client.shutdown(socket.SHUT_WR)
    rig.run_until(lambda: rig.legs.session.up.sent_eof)
    assert rig.server.recv(1) == b""
    reset(rig.client)
    rig.run_until(lambda: not rig.legs.alive)
    assert meets_a_reset(rig.server)
    assert rig.ended() == [End.RESET]


def test_a_reset_isnt_kept_for_ever_by_a_sink_that_takes_nothing(loop: Loop) -> None:
    limits = SessionLimits(hold=65536, stall=0.3)
    with Rig(Engine(loop, limits), small=True).connected() as rig:
        rig.client.setblocking(False)
        server = rig.legs._server
        assert server is not None
        while not undelivered(server):
            rig.client.send(b"x" * 500)
            turns(loop, 2)
            if undelivered(server):
                run_for(loop, 0.1)  # an acknowledgement may be late, by 40 ms
        assert not rig.legs.session.held
        reset(rig.client)
        turns(loop, 3)
        assert rig.legs.alive
        rig.run_until(lambda: not rig.legs.alive)
        assert loop.now - rig.legs.session.up.at >= limits.stall
        assert rig.ended() == [End.RESET]


def test_a_write_error_ends_it_at_once(loop: Loop, log: Log) -> None:
    with Rig(Engine(loop, LONG), small=True).connected() as rig:
        rig.flood(rig.server)  # the client doesn't read: so the server isn't read, nor its end
        reset(rig.server)
        turns(loop, 3)
        assert rig.legs.alive
        rig.client.sendall(b"x")
        turns(loop, 3)
        assert not rig.legs.alive
        assert was_reset(rig.client)
        assert rig.ended() == [End.RESET]
        assert log.details in (["server: connection reset by peer"], ["server: broken pipe"])


def test_the_loss_of_the_one_side_that_was_still_waited_for_ends_it(loop: Loop) -> None:
    with Rig(Engine(loop, LONG), small=True).connected() as rig:
        rig.client.setblocking(False)
        server = rig.legs._server
        assert server is not None
        while not undelivered(server):
            rig.client.send(b"x" * 500)
            turns(loop, 2)
            if undelivered(server):
                run_for(loop, 0.1)
        reset(rig.client)
        turns(loop, 3)
        assert rig.legs.session.is_resetting
        reset(rig.server)
        turns(loop, 3)
        assert not rig.legs.alive
        assert rig.ended() == [End.RESET]


def test_when_both_sides_are_lost_nothing_is_waited_for(loop: Loop) -> None:
    with Rig(Engine(loop, LONG), small=True).connected() as rig:
        rig.flood(rig.client)
        reset(rig.client)
        turns(loop, 3)
        assert rig.legs.alive
        reset(rig.server)
        rig.run_until(lambda: not rig.legs.alive)
        assert rig.ended() == [End.RESET]
