"""The command line: checked before anything is done, and how it ends.

What a user can cause is one line on stderr and exit status 1; wrong usage is 2, Ctrl-C 130.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from knet import trust
from krelay.cli.asking import Failed, Misused
from krelay.cli.parser import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status."""
    try:
        args = parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = args.run
        return command(args)
    except Misused as error:
        args.parser.print_usage(sys.stderr)
        print(f"{args.parser.prog}: error: {error}", file=sys.stderr)
        return 2
    except (Failed, trust.Untrusted) as error:
        print(f"krelay {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
