"""The command line of tcp-relay."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from krelay import log
from procfs_sim import DEFAULT_ROOT, ROOT_VARIABLE
from tcp_relay import options, workers
from tcp_relay.daemon import serve
from tcp_relay.service import GRACE, raise_descriptor_limit

EXAMPLE = """\
example:
  tcp-relay --root /run/krelay --log-level debug

It listens on the port in the file `gport`, asks krelay over `relay.sock` which server each client
wants, and needs no privilege.  SIGTERM lets running connections finish, Ctrl-C resets them; SIGUSR1
prints a table of them.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs tcp-relay; the exit status (0, 1, 2 for wrong usage, 130 after Ctrl-C)."""
    parser = argparse.ArgumentParser(
        prog="tcp-relay",
        description="The TCP relay daemon of krelay, in the foreground.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--root",
        type=Path,
        default=Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT),
        metavar="DIR",
        help=f"the file tree (default: ${ROOT_VARIABLE}, or {DEFAULT_ROOT})",
    )
    options.add_options(parser)
    log.add_options(parser)
    asked = parser.parse_args(arguments)
    log.set_up(asked.log_level, as_json=asked.log_json)
    limits = options.limits(asked)
    try:
        raise_descriptor_limit()
        return workers.run(
            asked.workers,
            lambda index, ready: serve(asked.root, limits, ready, index, asked.workers),
            grace=limits.drain + GRACE,
        )
    except KeyboardInterrupt:  # before the loop took the signals over
        return 130
    except OSError as error:
        print(f"tcp-relay: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
