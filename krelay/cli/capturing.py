"""`krelay trace --pcap FILE`: from the control socket into a file, or to standard output.

Only whole blocks are written, so whatever ends it (Ctrl-C, the daemon, a full disk, a reader that
has gone), the file opens.
"""

import os
import select
import signal
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from knet.wire import pcapng
from krelay.control.client import Captured

STDOUT = "-"


class CaptureFailed(Exception):
    """It can't be written, or not any more.  The text says why."""


class ReaderGone(Exception):
    """No program reads standard output any more."""


class Tally:
    """What a capture has in it so far."""

    def __init__(self) -> None:
        self.frames = 0
        self.lost = 0

    def add(self, blocks: bytes) -> None:
        """Counts what these whole blocks tell."""
        for kind, begin, end in pcapng.blocks(blocks):
            if kind == pcapng.PACKET:
                self.frames += 1
            elif kind == pcapng.STATISTICS:
                self.lost += pcapng.dropped_by(blocks[begin:end])

    def __str__(self) -> str:
        lost = f"{self.lost} lost because they weren't taken fast enough" if self.lost else ""
        return f"{self.frames} frames" + (f", {lost}" if lost else "")


def run(root: Path, request: str, name: str) -> int:
    """Captures into that file until Ctrl-C (130), or until its reader has gone (0).

    What was captured is said on stderr.  Raises CaptureFailed; NoDaemon, Rejected and OSError as
    Captured does.
    """
    shown = "standard output" if name == STDOUT else name
    if name == STDOUT and sys.stdout.isatty():
        raise CaptureFailed(
            "a terminal can't show a capture; try: krelay trace --pcap - | wireshark -k -i -"
        )
    try:
        ended = _capture(root, request, name, shown)
    except ReaderGone:
        return 0
    except pcapng.BadCapture as error:
        raise CaptureFailed(f"what krelay sends is no capture: {error}") from None
    if not ended:
        raise CaptureFailed("krelay has ended")
    return 128 + signal.SIGINT


def _capture(root: Path, request: str, name: str, shown: str) -> bool:
    """Until the daemon ends it; whether it was asked to."""
    tally = Tally()
    with Captured(root, request) as captured, _opened(name) as out, _until_signal(captured) as ask:
        try:
            print(f"capturing into {shown}; Ctrl-C ends it", file=sys.stderr, flush=True)
            _copy(captured, out, shown, tally)
        finally:
            print(f"{shown}: {tally}", file=sys.stderr, flush=True)
    return ask.ended


def _copy(captured: Captured, out: int, shown: str, tally: Tally) -> None:
    ready = select.poll()
    ready.register(captured.fileno(), select.POLLIN)
    ready.register(out, 0)  # errors alone: the reader of a pipe has gone
    blocks: bytes | None = captured.begun
    while blocks is not None:
        _write(out, blocks, shown)
        tally.add(blocks)
        if any(fd == out for fd, _ in ready.poll()):
            raise ReaderGone
        blocks = captured.more()


def _write(out: int, blocks: bytes, shown: str) -> None:
    """Writes them; a file keeps none of which it can't have the whole."""
    data = memoryview(blocks)
    try:
        while data:
            data = data[os.write(out, data) :]
    except BrokenPipeError:
        raise ReaderGone from None
    except OSError as error:
        raise CaptureFailed(f"{shown} can't be written any more: {error.strerror}") from None
    finally:
        if data and stat.S_ISREG(os.fstat(out).st_mode):
            written = len(blocks) - len(data)
            surplus = written - pcapng.whole(blocks[:written])
            os.ftruncate(out, os.lseek(out, 0, os.SEEK_CUR) - surplus)


@contextmanager
def _opened(name: str) -> Iterator[int]:
    """The descriptor to write to; a file is begun anew, anything else than a file is refused."""
    if name == STDOUT:
        yield sys.stdout.fileno()
        return
    try:
        if os.path.exists(name) and not os.path.isfile(name):
            raise CaptureFailed(f"{name} is there and is no regular file; choose another, or -")
        file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise CaptureFailed(f"{name} can't be written: {error.strerror}") from None
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise CaptureFailed(f"{name} is there and is no regular file; choose another, or -")
        os.ftruncate(file, 0)
        yield file
    finally:
        os.close(file)


class _Asked:
    """Whether the user has asked for the end."""

    ended = False


@contextmanager
def _until_signal(captured: Captured) -> Iterator[_Asked]:
    """Ctrl-C, or SIGTERM, asks the daemon for the end; a second one is KeyboardInterrupt."""
    asked = _Asked()

    def end(_number: int, _frame: FrameType | None) -> None:
        asked.ended = True
        for number in numbers:
            signal.signal(number, signal.default_int_handler)
        captured.finish()

    numbers = (signal.SIGINT, signal.SIGTERM)  # a shell has background jobs ignore SIGINT
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield asked
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
