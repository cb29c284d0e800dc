"""Lines that go to whoever reads them, or doesn't."""

import fcntl
import json
import logging
import os
import pty
import socket
import struct
import termios
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from knet import log
from knet.log import Sink
from tests.tools.logs import restored

LINE = b"x" * 99 + b"\n"
FULL = 1 << 20
"""Bytes that no pipe, socket or terminal here holds."""

Ends = tuple[int, int]
"""Where it is read, and where it is written."""
Sinks = Callable[[int], Sink]


def pipe() -> Ends:
    return os.pipe()


def stream() -> Ends:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return one.detach(), other.detach()


def terminal() -> Ends:
    master, slave = pty.openpty()
    tty.setraw(slave)
    return master, slave


KINDS = {"pipe": pipe, "socket": stream, "terminal": terminal}


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    made: Callable[[], Ends] = request.param
    pair = made()
    yield pair
    for end in pair:
        with suppress(OSError):
            os.close(end)


@pytest.fixture
def sinks() -> Iterator[Callable[[int], Sink]]:
    """Makes those that are closed in the end."""
    with ExitStack() as stack:

        def make(fd: int) -> Sink:
            return stack.enter_context(closing(Sink(fd)))

        yield make


def read(end: int, least: int = 1) -> bytes:
    """What waits there, and at least so much."""
    found = b""
    os.set_blocking(end, False)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            found += os.read(end, 1 << 20)
        except BlockingIOError:
            if len(found) >= least:
                return found
            time.sleep(0.001)
    raise AssertionError(f"{len(found)} bytes of {least}")


def fill(sink: Sink) -> int:
    """How many lines it took until there was no room."""
    for count in range(FULL // len(LINE)):
        if not sink.write(LINE):
            return count
    raise AssertionError("it takes whatever comes")


def test_lines_arrive_in_their_order(sinks: Sinks, ends: Ends) -> None:
    sink = sinks(ends[1])
    lines = [b"%d\n" % number for number in range(20)]
    assert all(map(sink.write, lines))
    assert read(ends[0], len(b"".join(lines))) == b"".join(lines)


@pytest.mark.serial
def test_where_nobody_reads_no_write_waits_and_no_line_is_torn(sinks: Sinks, ends: Ends) -> None:
    sink = sinks(ends[1])
    began = time.monotonic()
    taken = fill(sink)
    assert not any(sink.write(LINE) for _ in range(100))
    assert time.monotonic() - began < 5

    got = read(ends[0], 1000)
    while not sink.write(b"last\n"):  # there may be room for a part only
        got += read(ends[0])
    while not got.endswith(b"last\n"):
        got += read(ends[0])
    assert got == LINE * taken + b"last\n"


def test_others_with_the_same_descriptor_still_wait(sinks: Sinks, ends: Ends) -> None:
    """A shell whose terminal it is would read errors otherwise."""
    sinks(ends[1]).write(LINE)
    assert os.get_blocking(ends[1])
    assert not fcntl.fcntl(ends[1], fcntl.F_GETFL) & os.O_NONBLOCK


def test_who_reads_no_more_ends_nothing(sinks: Sinks, ends: Ends) -> None:
    sink = sinks(ends[1])
    os.close(ends[0])
    assert not sink.write(LINE)


def test_a_pipe_that_cant_be_opened_again_is_asked_first(
    sinks: Sinks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object) -> int:
        raise PermissionError

    reader, writer = os.pipe()
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.callback(os.close, writer)
        monkeypatch.setattr(os, "open", refuses)
        sink = sinks(writer)
        monkeypatch.undo()
        taken = fill(sink)
        assert read(reader, taken * len(LINE)) == taken * LINE


def test_a_file_gets_all(sinks: Sinks, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as file:
        sink = sinks(file.fileno())
        assert all(sink.write(LINE) for _ in range(FULL // len(LINE)))
    assert (tmp_path / "log").read_bytes() == LINE * (FULL // len(LINE))


@pytest.mark.parametrize("as_json", [False, True])
def test_the_next_line_says_how_many_were_lost(as_json: bool) -> None:
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    with ExitStack() as stack:
        stack.callback(os.close, reader)
        stack.enter_context(restored())
        log.set_up("info", as_json=as_json, stream=stack.enter_context(os.fdopen(writer, "w")))
        stack.callback(logging.getLogger("krelay").handlers[0].close)
        for number in range(100):
            log.Log("test").info("it happened", number=number)
        waiting = struct.unpack("i", fcntl.ioctl(reader, termios.FIONREAD, bytes(4)))[0]
        before = read(reader, waiting).decode().splitlines()
        lost = log.lines_lost()
        assert 0 < lost == 100 - len(before)

        log.Log("test").info("it happened again")
        notice, line = read(reader).decode().splitlines()
        assert "it happened again" in line
        if as_json:
            told = json.loads(notice)
            assert (told["level"], told["lost"]) == ("warning", lost)
        else:
            assert notice.endswith(f" warning log lines were lost lost={lost}")
        assert log.lines_lost() == lost
