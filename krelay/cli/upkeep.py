"""`krelay doctor`, `clean`, `demo`: what is about krelay, and not relaying itself."""

import argparse

from krelay.cli.asking import Failed, checked, joined
from procfs_sim.tree import parse


def doctor(args: argparse.Namespace) -> int:
    """`krelay doctor`.  Raises Failed for a value that is no setting's."""
    from krelay.cli import starting
    from krelay.doctor import command

    given = {
        "real_ip": args.real_ip,
        "gport": args.gport,
        "services": joined(args.services),
        "source": args.source,
    }
    texts = {name: checked(name, text) for name, text in given.items() if text is not None}
    asked = {name: parse(name, text) for name, text in texts.items()}
    if starting.is_starting(args.root):
        starting.wait(args.root)
    return command.run(
        args.root, args.client, args.queue_num, asked, fix=args.fix, as_json=args.json
    )


def clean(args: argparse.Namespace) -> int:
    """`krelay clean`.  Raises Failed."""
    from krelay.host import cleanup

    try:
        removed = cleanup.clean(args.root, keep_settings=args.keep_settings)
    except (cleanup.StillServed, cleanup.RulesUnavailable) as error:
        raise Failed(error) from None
    except PermissionError as error:
        raise Failed(f"{error.filename}: {error.strerror}; run as root") from None
    for line in removed:
        print(f"removed {line}")
    if not removed:
        print("nothing was left")
    return 0


def demo(args: argparse.Namespace) -> int:
    """`krelay demo`."""
    from krelay.demo import play

    return play.run(args)
