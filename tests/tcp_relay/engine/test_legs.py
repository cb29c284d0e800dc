"""Both legs on real sockets of the loopback: connecting, waiting too long, and ending.

The loop is turned by hand where it matters, all four ends are in this process, and limits are
fractions of a second.  Lower bounds of time are exact, upper ones are generous.
"""

import gc
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from knet.loop import Loop
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.legs import Legs
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.pump import Pump
from tcp_relay.engine.session import End
from tcp_relay.engine.sockets import Heard, heard, server_socket
from tests.tcp_relay.engine.rig import LONG, Log, Owner, Rig, meets_a_reset
from tests.tcp_relay.helpers import (
    BOUND,
    LOCALHOST,
    drain,
    everything,
    fill,
    free_port,
    full_server,
    reset,
    run_for,
    run_until,
    turns,
    was_reset,
)

# Connecting.


def test_a_server_that_is_not_there_is_told_and_another_may_be_tried(loop: Loop) -> None:
    with Rig(Engine(loop, LONG), connect=False) as rig:
        rig.legs.use_server(server_socket())
        rig.legs.connect((LOCALHOST, free_port()))
        rig.run_until(lambda: bool(rig.owner.told))
        assert rig.owner.told == ["ECONNREFUSED"]
        assert rig.legs.alive
        assert not rig.legs.is_connected
        with socket.create_server((LOCALHOST, 0)) as listening:
            rig.legs.use_server(server_socket())
            rig.legs.connect(listening.getsockname())
            rig.run_until(lambda: rig.legs.is_connected)
        assert rig.owner.told == ["ECONNREFUSED", "connected"]


def test_the_owner_hears_that_the_server_doesnt_answer_in_time(loop: Loop) -> None:
    engine = Engine(loop, SessionLimits(connect=0.2))
    with full_server() as address, Rig(engine, connect=False) as rig:
        begun = loop.now
        rig.legs.use_server(server_socket())
        rig.legs.connect(address)
        rig.client.sendall(b"that the client is alive doesn't help")
        rig.run_until(lambda: bool(rig.owner.told))
        assert loop.now - begun >= 0.2
        assert rig.owner.told == ["ETIMEDOUT"]
        assert rig.legs.alive  # there may be another server


def test_a_connection_that_was_opened_in_time_isnt_ended_by_the_connect_limit(
    loop: Loop,
) -> None:
    with Rig(Engine(loop, SessionLimits(connect=0.05))).connected() as rig:
        run_for(loop, 0.15)
        assert rig.legs.alive


def test_the_clients_reset_while_connecting_ends_it_at_once(loop: Loop, log: Log) -> None:
    with full_server() as address, Rig(Engine(loop, LONG), connect=False) as rig:
        rig.legs.use_server(server_socket())
        rig.legs.connect(address)
        reset(rig.client)
        rig.run_until(lambda: not rig.legs.alive)
        assert rig.owner.told == ["ended"]
        assert rig.ended() == [End.RESET]
        assert log.details == ["client: connection reset by peer"]
        assert rig.engine.counts.opened == 0


def test_what_a_client_says_and_ends_while_connecting_is_not_lost(loop: Loop) -> None:
    with Rig(Engine(loop, LONG), connect=False) as rig:
        rig.client.sendall(b"early")
        rig.client.shutdown(socket.SHUT_WR)
        turns(loop, 3)
        with socket.create_server((LOCALHOST, 0)) as listening:
            rig.legs.use_server(server_socket())
            rig.legs.connect(listening.getsockname())
            rig.run_until(lambda: rig.legs.session.up.sent_eof)
            server, _ = listening.accept()
        with server:
            assert everything(server) == b"early"
            server.sendall(b"late")
            server.close()
        rig.run_until(lambda: not rig.legs.alive)
        assert everything(rig.client) == b"late"
        assert rig.ended() == [End.CLOSED]


# Waiting too long.


def test_held_bytes_that_cant_be_written_for_so_long_reset_both_sides(loop: Loop, log: Log) -> None:
    with Rig(Engine(loop, LONG), small=True).connected() as rig:
        rig.flood(rig.client)
        rig.engine.use_stall(0.3)  # not before: the flood may take as long
        channel = rig.legs.session.up
        rig.server.sendall(b"that the other direction moves doesn't help")
        rig.run_until(lambda: not rig.legs.alive)
        assert loop.now - channel.at >= 0.3  # and not earlier
        assert was_reset(rig.client)
        assert was_reset(rig.server)
        assert rig.ended() == [End.STALLED]
        assert log.details == [f"the server took none of {len(channel.held)} bytes for 0.3 s"]


def test_a_sink_that_takes_something_now_and_then_isnt_stalled(loop: Loop) -> None:
    with Rig(Engine(loop, LONG)).connected() as rig:
        rig.flood(rig.client)
        rig.engine.use_stall(0.5)
        rig.server.setblocking(False)
        begun = loop.now
        while loop.now - begun < 1.2:
            before = rig.legs.session.up.moved
            while rig.legs.session.up.moved == before:
                drain(rig.server)
                fill(rig.client)
                run_for(loop, 0.01)
            run_for(loop, 0.1)
            assert rig.legs.alive


def test_a_slow_sink_for_which_our_kernel_has_no_room_isnt_stalled(loop: Loop) -> None:
    """The next write may be minutes away: what it acknowledges is what counts."""
    with Rig(Engine(loop, LONG)).connected() as rig:
        rig.flood(rig.server)
        rig.engine.use_stall(1.0)
        rig.client.setblocking(False)
        channel = rig.legs.session.down
        before, begun = channel.moved, loop.now
        while loop.now - begun < 1.6:
            rig.client.recv(1 << 16)
            run_for(loop, 0.1)
            assert rig.legs.alive, rig.ended()
        assert channel.moved == before, "the test is none: our kernel took some more"


def test_a_limit_that_is_lowered_ends_who_is_stalled_already(loop: Loop) -> None:
    with Rig(Engine(loop, LONG), small=True).connected() as rig:
        rig.flood(rig.client)
        rig.engine.use_stall(0.2)
        assert rig.engine.limits.hold == LONG.hold
        rig.run_until(lambda: not rig.legs.alive)
        assert rig.ended() == [End.STALLED]


LOST = Heard(probes=3, in_flight=0, sent=99.0, ago=99.0, acked=0)


def says_nothing(monkeypatch: pytest.MonkeyPatch, sock: object) -> None:
    """As the kernel tells it of this peer, from now on."""
    monkeypatch.setattr(
        "tcp_relay.engine.legs.heard", lambda asked: LOST if asked is sock else heard(asked)
    )


def test_who_moves_and_acknowledges_nothing_is_ended_on_either_side(
    loop: Loop, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    for side in ("client", "server"):
        with Rig(Engine(loop, LONG)).connected() as rig:
            rig.client.sendall(b"question")
            assert rig.legs._server is not None
            says_nothing(monkeypatch, getattr(rig.legs, f"_{side}"))
            run_for(loop, 0.01)
            rig.legs.check()  # has it asked
            assert rig.legs.alive
            rig.legs.check()
            assert rig.ended() == [End.STALLED]
            assert log.details[-1] == f"the {side} has acknowledged nothing for 25 s"


def test_who_is_owed_something_and_answers_nothing_is_ended_before_the_stall_limit(
    loop: Loop, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rig(Engine(loop, LONG), small=True).connected() as rig:
        rig.flood(rig.client)
        says_nothing(monkeypatch, rig.legs._server)
        rig.legs.check_deadline()
        assert rig.ended() == [End.STALLED]
        assert log.details == ["the server has acknowledged nothing for 25 s"]


def test_a_silence_in_which_this_process_stood_still_counts_for_nothing(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Rig(Engine(loop, LONG), small=True).connected() as rig:
        rig.flood(rig.client)
        says_nothing(monkeypatch, rig.legs._server)
        rig.engine.stood_still(60.0)
        rig.legs.check_deadline()
        rig.legs.check()
        rig.legs.check()
        assert rig.legs.alive
        monkeypatch.setattr(Engine, "awake", 25.0)
        rig.legs.check_deadline()
        assert rig.ended() == [End.STALLED]


@pytest.mark.parametrize("held_before", [False, True])
def test_an_idle_connection_is_never_ended(loop: Loop, held_before: bool) -> None:
    limits = SessionLimits(hold=65536, stall=LONG.stall, half_close=0.1, connect=0.3)
    with Rig(Engine(loop, limits)).connected() as rig:
        if held_before:
            sent = rig.flood(rig.client)
            received = 0
            deadline = time.monotonic() + BOUND
            while received < sent:
                assert time.monotonic() < deadline
                received += drain(rig.server)[0]
                run_for(loop, 0.001)
        rig.engine.use_stall(0.1)
        run_for(loop, 0.5)
        assert rig.legs.alive
        for source, sink in ((rig.client, rig.server), (rig.server, rig.client)):
            source.sendall(b"still there")
            turns(loop, 3)
            assert sink.recv(100) == b"still there"


@pytest.mark.parametrize("first", ["client", "server"])
def test_silence_in_the_direction_that_is_left_ends_it_after_the_channel_close_limit(
    loop: Loop, log: Log, first: str
) -> None:
    limits = SessionLimits(half_close=0.3)
    with Rig(Engine(loop, limits)).connected() as rig:
        done, other = (rig.client, rig.server) if first == "client" else (rig.server, rig.client)
        done.shutdown(socket.SHUT_WR)
        for _ in range(8):  # 0.64 s, more than the limit
            other.sendall(b"on and on")
            run_for(loop, 0.08)
            assert rig.legs.alive
        last = rig.legs.session.at
        rig.run_until(lambda: not rig.legs.alive)
        assert loop.now - last >= limits.half_close
        assert was_reset(done)
        assert meets_a_reset(other)
        assert rig.ended() == [End.FORGOTTEN]
        assert log.details == [f"the {first} has finished, and nothing came for 0.3 s"]


# Ending.


def test_an_end_resets_both_sides_and_is_told_once(rig: Rig, log: Log) -> None:
    rig.connected()
    rig.legs.end(End.KILLED, "because")
    rig.legs.end(End.KILLED, "again")
    assert was_reset(rig.client)
    assert was_reset(rig.server)
    assert rig.owner.told == ["connected", "ended"]
    assert rig.ended() == [End.KILLED]
    assert log.details == ["because"]
    assert len(rig.engine) == 0


def test_legs_without_a_server_can_be_ended(loop: Loop) -> None:
    with Rig(Engine(loop, LONG), connect=False) as rig:
        rig.legs.end(End.REFUSED)
        assert was_reset(rig.client)


def test_a_row_tells_who_and_how_long(loop: Loop) -> None:
    with Rig(Engine(loop, LONG)) as rig:
        assert rig.legs.row()[:3] == ("10.0.0.1:40000", "-", "connecting")
        rig.connected()
        rig.client.sendall(b"12345")
        rig.server.sendall(b"123")
        turns(loop, 3)
        moved_at = loop.now
        run_for(loop, 0.05)
        row = rig.legs.row()
        assert (row.state, row.from_client, row.from_server, row.held) == ("open", 5, 3, "0/0")
        assert row.idle == pytest.approx(loop.now - moved_at, abs=0.02)
        assert row.age >= row.idle
        sent = rig.flood(rig.client)
        assert sent
        assert rig.legs.row().held == f"{len(rig.legs.session.up.held)}/0"


def _all_of(kind: type | tuple[type, ...]) -> int:
    return sum(isinstance(thing, kind) for thing in gc.get_objects())


def _killed(rig: Rig) -> None:
    rig.legs.end(End.KILLED)


def _closed(rig: Rig) -> None:
    rig.client.close()
    rig.server.close()


def _client_reset(rig: Rig) -> None:
    reset(rig.client)


def _server_reset(rig: Rig) -> None:
    reset(rig.server)


def _stalled(rig: Rig) -> None:
    rig.flood(rig.client)
    rig.legs.end(End.STALLED)


def _both_lost(rig: Rig) -> None:
    rig.flood(rig.server)
    _closed(rig)


def _killed_while_queued(rig: Rig) -> None:
    fill(rig.client)
    turns(rig.loop)
    rig.legs.end(End.KILLED)


endings = [
    _killed,
    _closed,
    _client_reset,
    _server_reset,
    _stalled,
    _both_lost,
    _killed_while_queued,
]


@pytest.mark.parametrize("end", endings)
def test_nothing_of_an_ended_connection_waits_for_the_collector(
    end: Callable[[Rig], None],
) -> None:
    with Loop() as loop, ExitStack() as stack:
        engine = Engine(loop, LONG)
        gc.collect()
        gc.disable()
        stack.callback(gc.enable)
        pumps, owners = _all_of((Legs, Pump)), _all_of(Owner)
        for _ in range(3):
            with Rig(engine).connected() as rig:
                end(rig)
                run_until(loop, lambda: not engine)
            del rig
        turns(loop, 2)
        assert len(engine) == 0
        # Fewer: some of another test went meanwhile.
        assert _all_of((Legs, Pump)) <= pumps
        assert _all_of(Owner) <= owners
