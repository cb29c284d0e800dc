"""Logs: one line per event, to stderr, for people and for machines.

    2026-03-01T12:00:00.123Z info connection opened client=10.0.0.1:40000 server=192.168.0.1:80

An event is a constant message and fields.  Nothing is interpolated into the message, so lines can
be counted by it, and a field's value can't forge another field or another line: it is quoted as
JSON where it holds anything but plain printable ASCII.  Under the journal, which has its own clock,
the time and the level's word give way to the level prefix that it understands (sd-daemon(3)).
`--log-json` writes one JSON object a line.

The reader of a log can stall: a log shipper that hangs, a journal that was stopped, a terminal held
by Ctrl-S.  A pipe is full after 64 KB, and then a write waits.  A daemon that waits serves no
client; so what can't be written now is lost, and counted.  Whether a write waits is a matter of the
open file description (O_NONBLOCK, open(2)), which other programs share, a user's shell among them.
So that of a pipe or a terminal is not changed: it is opened once more, by /proc/self/fd.  A socket
is told with each write (MSG_DONTWAIT).  A file on a disk is written as it is.

It rests on the standard library's logging, so that a library's or a test's handlers work, but skips
the part that walks the stack for the caller's name: relaying logs two lines per connection.
"""

import argparse
import json
import logging
import os
import re
import select
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TextIO

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

_JOURNAL_PREFIX = {
    logging.DEBUG: "<7>",
    logging.INFO: "<6>",
    logging.WARNING: "<4>",
    logging.ERROR: "<3>",
}
_PLAIN = re.compile(r"[!#-<>-~]+")  # printable ASCII without blank, quote and equals sign
_NAME = "krelay"
_PACKAGES = Path(__file__).parent.parent
_OURS = frozenset({"knet", "procfs_sim", "krelay", "tcp_relay"})
FORMER = {"fix": "mend"}
"""Names of fields, and what they were called until now: for a release they have both names."""
MOST_KINDS = 256
"""Kinds of failures that are told apart."""


class Log:
    """Where a module's events go.

    A field that is None is left out; the message is the caller's constant.
    """

    __slots__ = ("_logger",)

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(f"{_NAME}.{name}")

    def debug(self, message: str, /, **fields: object) -> None:
        """What only a bug hunt wants to see."""
        self._log(logging.DEBUG, message, fields)

    def info(self, message: str, /, **fields: object) -> None:
        """What happened, as it should."""
        self._log(logging.INFO, message, fields)

    def warning(self, message: str, /, **fields: object) -> None:
        """What may need a look.  If it can repeat, ask a Throttle first."""
        self._log(logging.WARNING, message, fields)

    def error(self, message: str, /, **fields: object) -> None:
        """What has to be fixed."""
        self._log(logging.ERROR, message, fields)

    def enabled(self, level: int) -> bool:
        """Whether events of that level are written, for callers whose fields are dear."""
        return self._logger.isEnabledFor(level)

    def _log(self, level: int, message: str, fields: dict[str, object]) -> None:
        logger = self._logger
        if logger.isEnabledFor(level):
            record = logger.makeRecord(logger.name, level, "", 0, message, (), None)
            record.fields = fields
            logger.handle(record)


class Throttle:
    """Lets one event per interval pass and counts those it held back.

    >>> throttle = Throttle(interval=10.0)
    >>> [throttle.admit(now) for now in (0.0, 1.0, 2.0, 10.0, 11.0)]
    [0, None, None, 2, None]
    """

    __slots__ = ("_interval", "_next", "suppressed")

    def __init__(self, interval: float = 10.0) -> None:
        self._interval = interval
        self._next: float | None = None
        self.suppressed = 0
        """Events held back since the last that passed."""

    def admit(self, now: float) -> int | None:
        """How many were held back before this one, or None: this one is to be held back as well."""
        if self._next is not None and now < self._next:
            self.suppressed += 1
            return None
        self._next = now + self._interval
        before, self.suppressed = self.suppressed, 0
        return before


class Failures:
    """Says once what fails: a line per message, place and kind of error in so many seconds.

    Failures of the host come in crowds, at many places at once; each is told, and none repeated.
    """

    def __init__(self, log: Log, interval: float = 10.0) -> None:
        self._log = log
        self._interval = interval
        self._throttles: dict[tuple[str, str, int | None], Throttle] = {}

    def tell(self, now: float, message: str, error: OSError, **fields: object) -> None:
        """Warns of `error`, with the place in our code that met it, unless that was said just now.

        `again` counts those that were held back since.
        """
        place = _place(error)
        if len(self._throttles) >= MOST_KINDS:
            self._throttles.clear()
        key = (message, place, error.errno)
        throttle = self._throttles.setdefault(key, Throttle(self._interval))
        if (before := throttle.admit(now)) is not None:
            self._log.warning(message, error=error, at=place, again=before or None, **fields)

    @contextmanager
    def going_on(self, now: float) -> Iterator[None]:
        """A call of the host that fails in here is told, and what follows is done all the same."""
        try:
            yield
        except OSError as error:
            self.tell(now, "a call failed; going on", error)


def stood_still(log: Log, seconds: float) -> None:
    """Says that this process did nothing for so long (Loop.on_absence)."""
    log.info("stood still; timers wait for as long", seconds=round(seconds, 1))


class Sink:
    """The end of a log that a descriptor leads to, which stays the caller's."""

    def __init__(self, fd: int) -> None:
        self._write, self._close = _writer(fd)
        self._rest = b""
        """Of a line that went only in part."""

    def write(self, line: bytes) -> bool:
        """Whether it is written, now or with the next.  Raises nothing, and never waits."""
        data = self._rest + line
        try:
            count = self._write(data)
        except OSError:  # full, or no reader is there
            count = 0
        if count <= len(self._rest) < len(data):
            self._rest = self._rest[count:]
            return False
        self._rest = data[count:]
        return True

    def close(self) -> None:
        """Lets go of what was opened for it."""
        self._close()


class LineHandler(logging.Handler):
    """Writes lines to a descriptor.  What can't be written without waiting is lost, and the next
    line that can be says how many were."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._sink = Sink(fd)
        self._untold = 0
        self.lost = 0
        """Lines that could not be written."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the line of this record."""
        if self._untold:
            notice = logging.makeLogRecord(
                {"levelno": logging.WARNING, "levelname": "WARNING", "msg": "log lines were lost"}
                | {"fields": {"lost": self._untold}}
            )
            if not self._write(notice):
                return self._lost()
            self._untold = 0
        if not self._write(record):
            self._lost()
        return None

    def close(self) -> None:
        """Lets go of what was opened for it."""
        self._sink.close()
        super().close()

    def _write(self, record: logging.LogRecord) -> bool:
        return self._sink.write(self.format(record).encode(errors="backslashreplace") + b"\n")

    def _lost(self) -> None:
        self.lost += 1
        self._untold += 1


class TextFormatter(logging.Formatter):
    """`TIME LEVEL MESSAGE KEY=VALUE ...`, or `<N>MESSAGE KEY=VALUE ...` for the journal."""

    def __init__(self, journal: bool) -> None:
        super().__init__()
        self._journal = journal

    def format(self, record: logging.LogRecord) -> str:
        if self._journal:
            head = _JOURNAL_PREFIX.get(record.levelno, "")
        else:
            head = f"{_stamp(record)} {record.levelname.lower()} "
        words = [head + _one_line(record.getMessage())]
        words += [
            f"{name}={_quoted(str(value))}" for name, value in _fields(record) if value is not None
        ]
        return " ".join(words)


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, message, the fields; numbers and truth values stay such."""

    def format(self, record: logging.LogRecord) -> str:
        head = {
            "time": _stamp(record),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        fields = {
            name: value if type(value) in (int, float, bool) else str(value)
            for name, value in _fields(record)
            if value is not None
        }
        return json.dumps({**head, **fields, **head})


def add_options(parser: argparse.ArgumentParser) -> None:
    """`--log-level` and `--log-json`, as `log_level` and `log_json`."""
    add_level_option(parser)
    parser.add_argument("--log-json", action="store_true", help="one JSON object a line")


def add_level_option(parser: argparse.ArgumentParser) -> None:
    """`--log-level`, as `log_level`."""
    parser.add_argument(
        "--log-level",
        choices=LEVELS,
        default="info",
        metavar="LEVEL",
        help=f"{', '.join(LEVELS)} (default: info)",
    )


def set_up(
    level: str = "info",
    *,
    as_json: bool = False,
    stream: TextIO | None = None,
    journal: bool | None = None,
) -> None:
    """Sends all events from `level` (a key of LEVELS) up to `stream`, stderr unless told.

    `journal` says whether the stream is the journal; None finds out.  A second call replaces the
    first.
    """
    stream = sys.stderr if stream is None else stream
    handler: logging.Handler
    try:
        handler = LineHandler(stream.fileno())
    except (OSError, ValueError):  # no file, or none any more
        handler = logging.StreamHandler(stream)
    formatter = TextFormatter(is_journal(stream) if journal is None else journal)
    handler.setFormatter(JsonFormatter() if as_json else formatter)
    logging.raiseExceptions = False  # a stderr that went away is no reason to stop relaying
    logger = logging.getLogger(_NAME)
    for former in logger.handlers:
        former.close()
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(LEVELS[level])


def lines_lost() -> int:
    """How many lines could not be written, so far."""
    handlers = logging.getLogger(_NAME).handlers
    return sum(each.lost for each in handlers if isinstance(each, LineHandler))


def is_journal(stream: TextIO) -> bool:
    """Whether the stream leads to the journal:

    JOURNAL_STREAM names its device and inode (systemd.exec(5)).
    """
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _fields(record: logging.LogRecord) -> list[tuple[str, object]]:
    fields: dict[str, object] = getattr(record, "fields", {})
    former = [(FORMER[name], value) for name, value in fields.items() if name in FORMER]
    return [*fields.items(), *former]


def _place(error: BaseException) -> str:
    """The last call of our own packages on the way to the error, like krelay/host/links.py:39."""
    place, where = "", error.__traceback__
    while where is not None:
        path = Path(where.tb_frame.f_code.co_filename)
        if path.is_relative_to(_PACKAGES) and path.relative_to(_PACKAGES).parts[0] in _OURS:
            place = f"{path.relative_to(_PACKAGES)}:{where.tb_lineno}"
        where = where.tb_next
    return place


def _stamp(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03}Z"


def _quoted(value: str) -> str:
    return value if _PLAIN.fullmatch(value) else json.dumps(value)


def _one_line(message: str) -> str:
    return message if message.isprintable() else json.dumps(message)


def _writer(fd: int) -> tuple[Callable[[bytes], int], Callable[[], object]]:
    """How to write there, and how to end that."""
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        end = socket.socket(fileno=os.dup(fd))
        at_once = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
        return lambda data: end.send(data, at_once), end.close
    if stat.S_ISFIFO(mode) or os.isatty(fd):
        try:
            flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            own = os.open(f"/proc/self/fd/{fd}", flags)
        except OSError:  # another user's
            return _careful(fd), lambda: None
        return partial(os.write, own), partial(os.close, own)
    return partial(os.write, fd), lambda: None


def _careful(fd: int) -> Callable[[bytes], int]:
    """Asks before each write, which may still wait if another program is faster."""
    room = select.poll()
    room.register(fd, select.POLLOUT)

    def write(data: bytes) -> int:
        if not room.poll(0):
            return 0
        return os.write(fd, data[: select.PIPE_BUF])

    return write
