"""python -m vm: labs for people.  Only `up` makes a lab that outlives its process.

Exit status: 0 done, 1 it failed (one line on stderr), 2 wrong usage, 130 Ctrl-C; `exec` ends as its
command does.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vm import netns, registry
from vm.errors import LabError
from vm.lab import Lab, build, remove
from vm.registry import Record
from vm.topology import DEFAULT, TopologyError, draw, parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "exec" and not options.argv:
        parser.error("exec needs a COMMAND, as in: python -m vm exec client ip addr")
    try:
        if os.geteuid() != 0:
            raise LabError("needs root (network namespaces); try with sudo")
        match options.command:
            case "up":
                _up(options.name, options.topology)
            case "exec":
                _exec(options.name, options.host, options.argv)
            case "list":
                _list()
            case "down":
                _down(options.name, everything=options.all, stale=options.stale)
    except (LabError, TopologyError, OSError) as error:
        print(f"python -m vm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _up(name: str | None, file: Path | None) -> None:
    try:
        topology = parse(file.read_text()) if file else DEFAULT
    except (UnicodeDecodeError, TopologyError) as error:
        raise LabError(f"{file}: {error}") from None
    record = build(topology, name, None, {})
    print(f"{draw(topology)}\n\nlab {record.name} is up", flush=True)
    for host in record.hosts[:1]:
        print(f"run a command in it:  python -m vm exec --name {record.name} {host} ip addr")
        print(f"enter a host:         ip netns exec {record.name}-{host} sh")
    print(f"remove it:            python -m vm down --name {record.name}")


def _exec(name: str | None, host: str, argv: list[str]) -> None:
    record = _chosen(name)
    if host not in record.hosts:
        raise LabError(
            f"lab {record.name} has no host {host!r}; there are {', '.join(record.hosts)}"
        )
    command = netns.command(f"{record.name}-{host}", *argv)
    os.execvp(command[0], command)


def _list() -> None:
    for record in registry.records():
        if record.owner is None:
            state = "stays"
        else:
            state = f"{'left by' if record.stale else 'belongs to'} process {record.owner.pid}"
        print(f"{record.name}  {state}  {' '.join(record.hosts)}")


def _down(name: str | None, *, everything: bool, stale: bool) -> None:
    if everything or stale:
        removed = Lab.remove_leftovers()
        if everything:
            stay = [record for record in registry.records() if record.owner is None]
            for record in stay:
                remove(record)
            removed += [record.name for record in stay]
    else:
        record = _chosen(name)
        if record.owner is not None and not record.stale:
            raise LabError(f"lab {record.name} belongs to process {record.owner.pid}: end that")
        remove(record)
        removed = [record.name]
    print("\n".join(f"lab {name} removed" for name in removed) or "nothing to remove")


def _chosen(name: str | None) -> Record:
    """The lab of that name, or the only one that stays."""
    records = registry.records()
    if name is None:
        records = [record for record in records if record.owner is None]
        if len(records) > 1:
            names = ", ".join(record.name for record in records)
            raise LabError(f"there are several labs, {names}: say which with --name")
        if not records:
            raise LabError("there is no lab; make one with: python -m vm up")
        return records[0]
    for record in records:
        if record.name == name:
            return record
    raise LabError(f"there is no lab {name}; python -m vm list shows those there are")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vm",
        description="Virtual hosts in network namespaces, apart from this machine's own network.",
        epilog="example: python -m vm up && python -m vm exec client ip route && python -m vm down",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    up = commands.add_parser(
        "up",
        help="build a lab that stays",
        epilog="example: python -m vm up --topology office.toml",
    )
    up.add_argument("--name", help="what to call it (default: made up)")
    up.add_argument(
        "--topology",
        metavar="FILE",
        type=Path,
        help="TOML: hosts and links (default: client, relay, server)",
    )

    run = commands.add_parser(
        "exec",
        help="run a command in a host, and end as it does",
        usage="python -m vm exec [-h] [--name NAME] HOST COMMAND...",
        epilog="example: python -m vm exec relay ip addr",
    )
    run.add_argument("--name", help="which lab (default: the only one that stays)")
    run.add_argument("host", metavar="HOST")
    run.add_argument("argv", metavar="COMMAND", nargs=argparse.REMAINDER)

    commands.add_parser(
        "list", help="show the labs on this machine", epilog="example: python -m vm list"
    )

    down = commands.add_parser(
        "down", help="remove a lab", epilog="example: python -m vm down --stale"
    )
    which = down.add_mutually_exclusive_group()
    which.add_argument("--name", help="which lab (default: the only one that stays)")
    which.add_argument("--all", action="store_true", help="all that stay or were left behind")
    which.add_argument("--stale", action="store_true", help="those whose process was killed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
