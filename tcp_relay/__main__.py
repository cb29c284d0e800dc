"""The command line of tcp-relay."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from krelay import log
from procfs_sim import DEFAULT_ROOT, ROOT_VARIABLE
from tcp_relay.daemon import serve

EXAMPLE = """\
example:
  tcp-relay --root /run/krelay --log-level debug

It listens on the port in the file `gport`, asks krelay over `relay.sock` which server each client
wants, and needs no privilege.  Ctrl-C or SIGTERM ends it and resets the running connections.
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
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes (only 1)")
    log.add_options(parser)
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers {options.workers}: there must be one at least")
    if options.workers > 1:
        parser.error("several workers are not supported yet; leave --workers out")
    log.set_up(options.log_level, as_json=options.log_json)
    try:
        return serve(options.root)
    except KeyboardInterrupt:  # before the loop took the signals over
        return 130
    except OSError as error:
        print(f"tcp-relay: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
