"""The command line of tcp-relay."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from knet import log, privileges, relayoptions
from knet.loop import Loop
from knet.privileges import Account, NoAccount
from knet.usage import CommandParser
from procfs_sim import DEFAULT_ROOT, ROOT_VARIABLE, ondisk
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.relay.daemon import TcpRelayDaemon
from tcp_relay.service import options
from tcp_relay.service.service import run_program

PROGRAM = "tcp-relay"
EXAMPLE = """\
example:
  tcp-relay --root /run/krelay --log-level debug

It listens on the port in the file `gport`, asks krelay over `relay.sock` which server each client
wants, and needs no privilege.  SIGTERM lets running connections finish, Ctrl-C resets them; SIGUSR1
prints a table of them.
"""


def parser() -> CommandParser:
    """What can be typed."""
    parser = CommandParser(
        prog=PROGRAM,
        description="The TCP relay daemon of krelay, in the foreground.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_version()
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT),
        metavar="DIR",
        help=f"the file tree (default: ${ROOT_VARIABLE}, or {DEFAULT_ROOT})",
    )
    parser.add_argument(
        "--user",
        type=_account,
        metavar="USER",
        help="started as root: run as this user, a name or UID:GID",
    )
    relayoptions.add_relay_options(parser)
    log.add_options(parser)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs tcp-relay; the exit status (0, 1, 2 for wrong usage, 130 after Ctrl-C)."""
    asked = parser().read(arguments)

    def serve(limits: SessionLimits, index: int, ready: Callable[[], None]) -> int:
        with Loop() as loop:
            return TcpRelayDaemon(
                loop,
                asked.root,
                limits,
                ready,
                index,
                asked.workers,
                follows_stall=options.follows_stall(asked),
                keeps_dscp=asked.dscp == "keep",
            ).run()

    return run_program(
        PROGRAM,
        asked,
        serve,
        before=lambda: ondisk.check(asked.root),
        user=asked.user,
    )


def _account(text: str) -> Account:
    try:
        return privileges.account(text)
    except NoAccount as error:
        raise argparse.ArgumentTypeError(str(error)) from None


if __name__ == "__main__":
    sys.exit(main())
