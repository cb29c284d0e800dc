"""The requests and answers of active connections, and the programs that answer."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from benchmarks import bulk, echo, idle, peers
from benchmarks.ground import CannotMeasure
from tests.benchmarks.needs import need


@contextmanager
def serving(*command: str) -> Iterator[tuple[str, int]]:
    """The program with a free port as its last argument; where it listens."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        to = ("127.0.0.1", found.getsockname()[1])
    with subprocess.Popen([sys.executable, *command, str(to[1])]) as process:
        try:
            for _ in range(2000):
                with socket.socket() as trial:
                    if trial.connect_ex(to) == 0:
                        break
                time.sleep(0.01)
            yield to
        finally:
            process.kill()


@contextmanager
def pairs(count: int) -> Iterator[tuple[list[socket.socket], list[socket.socket]]]:
    with ExitStack() as held:
        made = [socket.socketpair() for _ in range(count)]
        for pair in made:
            for each in pair:
                held.enter_context(each)
        yield [near for near, _ in made], [far for _, far in made]


def test_every_connection_has_its_answers_before_it_ends() -> None:
    with serving(echo.__file__) as to, ExitStack() as held:
        made = [held.enter_context(socket.create_connection(to, 10)) for _ in range(20)]
        assert idle.round_trips(made, 0.1) > 20
        assert idle.round_trips(made, 0.1) > 20  # nothing of the first is left over
        for each in made:
            each.setblocking(False)
            with pytest.raises(BlockingIOError):
                each.recv(1)


def test_the_echo_outlives_clients_that_go_away() -> None:
    with serving(echo.__file__) as to:
        with socket.create_connection(to, 10) as rude:
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            rude.sendall(b"x")
        with socket.create_connection(to, 10) as client:
            client.sendall(b"still there?")
            assert client.recv(100) == b"still there?"


def test_the_rate_is_of_answers() -> None:
    with pairs(1) as ([near], [far]):

        def answer_every_tenth_of_a_second() -> None:
            while request := far.recv(200):
                time.sleep(0.1)
                far.sendall(request)

        thread = threading.Thread(target=answer_every_tenth_of_a_second)
        thread.start()
        rate = idle.round_trips([near], 0.5)
        near.close()
        thread.join()
    assert 0 < rate <= 10


def test_a_wrong_answer_is_no_round_trip() -> None:
    with pairs(2) as (near, far):
        far[0].sendall(idle.REQUEST)
        far[1].sendall(idle.REQUEST[:-1] + b"?")
        with pytest.raises(CannotMeasure, match="isn't the request"):
            idle.round_trips(near, 0.0)


def test_no_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idle, "_PATIENCE", 0.05)
    with pairs(3) as (near, far):
        far[0].sendall(idle.REQUEST)
        with pytest.raises(CannotMeasure, match="2 requests without an answer"):
            idle.round_trips(near, 0.0)


def test_the_sink_counts_what_was_sent_and_tells_by_whom(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(12_345))
    with serving(bulk.__file__, "sink") as to:
        for _ in range(2):  # it serves one after the other
            address, count, seconds = bulk.send(to, 0.05, file).split()
            assert address == "127.0.0.1"
            assert int(count) >= 12_345
            assert float(seconds) >= 0.05


@pytest.mark.net
def test_idle_connections_through_a_proxy_take_memory_and_leave_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    need(*peers.HAPROXY.needs)
    monkeypatch.setattr(idle, "IDLE_SECONDS", 0.01)
    readings = idle.through(peers.HAPROXY, 500, 0.1)
    assert 100 < readings[idle.RSS, "bytes"] < 100_000
    assert readings[idle.ALONE, "round trips/s"] > 0
    assert readings[idle.AMONG, "round trips/s"] > 0
