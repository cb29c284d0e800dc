"""The options that tcp-relay and tcpproxy share, limits and workers, and what is tcp-relay's alone.

`krelay up` takes them as well, and hands them on: so they are read here, below both packages.

>>> size("512K"), size("1M"), size("4096")
(524288, 1048576, 4096)
"""

import argparse
from functools import partial

HOLD = 512 << 10
"""Bytes held per direction, unless told."""
MAX_HOLD = 64 << 20
"""Bytes that may be held: what is read at once is as long."""
STALL, HALF_CLOSE, CONNECT, DRAIN = 10.0, 3600.0, 10.0, 30.0
"""Seconds (tcp_relay/engine/limits.py says of what)."""
_SUFFIXES = {"K": 1 << 10, "M": 1 << 20}
_DAY = 86400.0
MAX_WORKERS = 256


def add_options(parser: argparse.ArgumentParser, stall: str = "") -> None:
    """Adds those of both programs.

    `stall` says where that limit comes from if it isn't given: `follows_stall`.
    """
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--buffer",
        type=size,
        default=HOLD,
        metavar="SIZE",
        help=f"bytes held per direction at most, K or M for more ({HOLD >> 10}K)",
    )
    for name, least, value, text in (
        ("--stall", 0.01, None if stall else STALL, "for a peer to take what is held"),
        ("--half-close", 0.01, HALF_CLOSE, "silence after one side has finished ends it"),
        ("--connect-timeout", 0.01, CONNECT, "for the server to accept"),
        ("--drain", 0.0, DRAIN, "for running connections to end after SIGTERM"),
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
