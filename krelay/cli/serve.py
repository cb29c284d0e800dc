"""`krelay daemon` and `krelay up`: the daemons, in the foreground."""

import argparse
from collections.abc import Iterator
from contextlib import closing

from knet import log, relayoptions, trust
from krelay.cli.asking import Failed, checked, joined


def daemon(args: argparse.Namespace) -> int:
    """`krelay daemon`: serves until a signal ends it.  Raises Failed."""
    from krelay.host.witness import Witness

    log.set_up(args.log_level, as_json=args.log_json)
    try:
        witness = Witness()
    except OSError as error:
        raise Failed(f"can't start a process: {error.strerror}") from None
    with closing(witness):
        # Not before: the two would share these modules' memory, and each page that one of them
        # changes later would be one more.
        from krelay.daemon import daemon

        try:
            return daemon.serve(args.root, args.queue_num, witness, args.relay_gid)
        except daemon.CannotServe as error:
            raise Failed(error) from None


def up(args: argparse.Namespace) -> int:
    """`krelay up`: both daemons, until Ctrl-C.  Raises Failed."""
    from krelay.cli import up
    from krelay.control import client

    given = {"real_ip": args.real_ip, "gport": args.gport}
    given |= {"services": joined(args.services), "source": args.source, "datapath": args.datapath}
    values = {name: checked(name, text) for name, text in given.items() if text is not None}
    logs = ["--log-level", args.log_level]
    log.set_up(args.log_level)
    try:
        return up.run(
            args.root,
            values,
            [*logs, "--queue-num", str(args.queue_num)],
            [*logs, *_relay_arguments(args)],
            look=not args.no_doctor,
        )
    except trust.Untrusted:
        raise
    except (up.UpFailed, client.NoDaemon, client.Rejected, OSError) as error:
        raise Failed(error) from None


def _relay_arguments(args: argparse.Namespace) -> Iterator[str]:
    """What was asked for of tcp-relay's options, as tcp-relay reads it."""
    parser = argparse.ArgumentParser(add_help=False)
    relayoptions.add_relay_options(parser)
    for name, default in vars(parser.parse_args([])).items():
        value = getattr(args, name)
        if value == default:
            continue
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield str(value)
