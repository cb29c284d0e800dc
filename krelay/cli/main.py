"""The command line: checked before anything is done, and how it ends.

What a user can cause is one line on stderr and exit status 1; wrong usage is 2, also that there is
no command (then its help is shown, as git, ip and uv do, which fail as well); Ctrl-C is 130.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from knet import trust
from krelay.cli.asking import Failed, Misused
from krelay.cli.parser import WITHOUT_TREE, parser, tree


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status."""
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        if words[:1] == ["help"]:
            words = [*words[1:2], "--help"]
        args = parser().read(words)
        if args.command is None:  # a script whose command is empty must not go on as if it ran
            parser().print_help(sys.stderr)
            return 2
        if args.root is not None and args.command in WITHOUT_TREE:
            raise Misused(f"{args.command} has a file tree of its own; leave out --root")
        args.root = tree(args)
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
