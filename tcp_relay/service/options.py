"""The options that tcp-relay and tcpproxy share, limits and workers, and what is tcp-relay's alone.

>>> size("512K"), size("1M"), size("4096")
(524288, 1048576, 4096)
"""

import argparse
from functools import partial

from tcp_relay.engine.limits import MAX_HOLD, SessionLimits

_SUFFIXES = {"K": 1 << 10, "M": 1 << 20}
_DAY = 86400.0
MAX_WORKERS = 256


def add_options(parser: argparse.ArgumentParser, stall: str = "") -> None:
    """Adds them; `limits` reads the limits back, `workers` is a number.

    `stall` says where that limit comes from if it isn't given: `follows_stall`.
    """
    default = SessionLimits()
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--buffer",
        type=size,
        default=default.hold,
        metavar="SIZE",
        help=f"bytes held per direction at most, K or M for more ({default.hold >> 10}K)",
    )
    for name, least, value, text in (
        ("--stall", 0.01, None if stall else default.stall, "for a peer to take what is held"),
        ("--half-close", 0.01, default.half_close, "silence after one side has finished ends it"),
        ("--connect-timeout", 0.01, default.connect, "for the server to accept"),
        ("--drain", 0.0, default.drain, "for running connections to end after SIGTERM"),
    ):
        group.add_argument(
            name,
            type=partial(seconds, least=least),
            default=value,
            metavar="SECONDS",
            help=f"{text} ({stall if value is None else f'{value:g}'})",
        )
    parser.add_argument(
        "--workers", type=workers, default=1, metavar="N", help="processes that share the port (1)"
    )
    parser.add_argument(
        "--no-seccomp",
        action="store_true",
        help="any system call may be made; for a libc that needs one this program doesn't know of",
    )


def add_relay_options(parser: argparse.ArgumentParser) -> None:
    """Those of tcp-relay, which `krelay up` passes on to it: the same, and what is its own."""
    parser.add_argument(
        "--dscp",
        choices=("keep", "none"),
        default="keep",
        help="with which DSCP each leg sends: that which the other end sends with, or none (keep)",
    )
    add_options(parser, stall="`timeouts/stall` in the file tree")


def limits(options: argparse.Namespace) -> SessionLimits:
    """What was asked for."""
    return SessionLimits(
        hold=options.buffer,
        stall=SessionLimits().stall if follows_stall(options) else options.stall,
        half_close=options.half_close,
        connect=options.connect_timeout,
        drain=options.drain,
    )


def follows_stall(options: argparse.Namespace) -> bool:
    """Whether that limit was not given, and there is another place to take it from."""
    return options.stall is None


def size(text: str) -> int:
    """Bytes; raises ArgumentTypeError."""
    number, factor = text, 1
    if text and text[-1].upper() in _SUFFIXES:
        number, factor = text[:-1], _SUFFIXES[text[-1].upper()]
    if not (number.isascii() and number.isdigit()) or not 1 <= int(number) * factor <= MAX_HOLD:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a size from 1 to {MAX_HOLD >> 20}M (512K, 1M, 65536)"
        )
    return int(number) * factor


def seconds(text: str, least: float = 0.0) -> float:
    """From `least` to 30 days; raises ArgumentTypeError."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not least <= value <= 30 * _DAY:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from {least:g} up")
    return value


def workers(text: str) -> int:
    """Raises ArgumentTypeError."""
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_WORKERS}")
    return int(text)
