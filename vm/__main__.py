"""python -m krelay_vm: labs for people.  Only `up` makes a lab that outlives its process.

What can be done with a lab at a terminal is in `krelay_vm.attended`.

Exit status: 0 done, 1 it failed (one line on stderr), 2 wrong usage, 130 Ctrl-C; `exec` ends as its
command does.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from knet.usage import CommandParser, meant
from krelay_vm import attended, guest, netns, registry
from krelay_vm.build import boot_to_stay, build, machines, remove, remove_leftovers
from krelay_vm.errors import LabError
from krelay_vm.registry import Record
from krelay_vm.topology import DEFAULT, Topology, TopologyError, draw
from krelay_vm.topologyfile import parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    if unknown and options.command != "up":
        hint = meant(unknown[0], options.parser.known)
        options.parser.error(f"unknown: {' '.join(unknown)}{hint}")
    if options.command == "exec" and not options.argv:
        parser.error("exec needs a COMMAND, as in: python -m krelay_vm exec client ip addr")
    try:
        if os.geteuid() != 0:
            raise LabError("needs root (network namespaces); try with sudo")
        match options.command:
            case "up":
                topology = _topology(options.topology)
                try:
                    backends = _backends(topology, options.backend, options.host, unknown)
                except ValueError as error:
                    parser.error(str(error))
                _up(options.name, topology, backends)
            case "exec":
                return _exec(options.name, options.host, options.argv)
            case "console":
                record = _chosen(options.name)
                return attended.console(record, _host(record, options.host))
            case "capture":
                count = attended.capture(_chosen(options.name), options.link, options.file)
                print(f"{count} frames in {options.file}")
            case "list":
                _list()
            case "down":
                _down(options.name, everything=options.all, stale=options.stale)
    except (LabError, TopologyError, OSError) as error:
        print(f"python -m krelay_vm: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _topology(file: Path | None) -> Topology:
    try:
        return parse(file.read_text()) if file else DEFAULT
    except (UnicodeDecodeError, TopologyError) as error:
        raise LabError(f"{file}: {error}") from None


def _backends(
    topology: Topology, all_hosts: str, pairs: Sequence[str], options: Sequence[str]
) -> dict[str, str]:
    """What each host sits on; `options` are those called after hosts.  Raises ValueError."""
    chosen = dict.fromkeys(topology.names, all_hosts)
    words = [word for option in options for word in option.split("=", 1)]
    if len(words) % 2:
        raise ValueError(f"{' '.join(options)}? A host is followed by its backend: --client uml")
    named = [pair.partition("=") for pair in pairs]
    named += [
        (option, "=", backend) for option, backend in zip(words[::2], words[1::2], strict=False)
    ]
    for name, _, backend in named:
        host = name.removeprefix("--")
        if host not in chosen:
            raise ValueError(f"{name}? There are the hosts {', '.join(chosen)}")
        if backend not in guest.BACKENDS:
            raise ValueError(f"{name} {backend}? There are {', '.join(guest.BACKENDS)}")
        chosen[host] = backend
    return chosen


def _up(name: str | None, topology: Topology, backends: Mapping[str, str]) -> None:
    record = build(topology, name, None, machines(topology, backends))
    try:
        attended.note_links(record, topology)
        boot_to_stay(record, topology)
    except BaseException:
        remove(record)
        raise
    print(f"{draw(topology)}\n\nlab {record.name} is up", flush=True)
    for host in record.hosts[:1]:
        print(f"run a command in it:  python -m krelay_vm exec --name {record.name} {host} ip addr")
        print(f"enter a host:         python -m krelay_vm console --name {record.name} {host}")
    print(f"remove it:            python -m krelay_vm down --name {record.name}")


def _host(record: Record, host: str) -> str:
    if host not in record.hosts:
        raise LabError(
            f"lab {record.name} has no host {host!r}; there are {', '.join(record.hosts)}"
        )
    return host


def _exec(name: str | None, host: str, argv: list[str]) -> int:
    record = _chosen(name)
    if _host(record, host) in dict(record.machines):
        return attended.execute(record, host, argv)
    command = netns.command(f"{record.name}-{host}", *argv)
    os.execvp(command[0], command)


def _list() -> None:
    for record in registry.records():
        if record.owner is None:
            state = "stays"
        else:
            state = f"{'left by' if record.stale else 'belongs to'} process {record.owner.pid}"
        on = dict(record.machines)
        hosts = (f"{host} ({on[host]})" if host in on else host for host in record.hosts)
        print(f"{record.name}  {state}  {' '.join(hosts)}")


def _down(name: str | None, *, everything: bool, stale: bool) -> None:
    if everything or stale:
        removed = remove_leftovers()
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
            raise LabError("there is no lab; make one with: python -m krelay_vm up")
        return records[0]
    for record in records:
        if record.name == name:
            return record
    raise LabError(f"there is no lab {name}; python -m krelay_vm list shows those there are")


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m krelay_vm",
        description="Virtual hosts, in network namespaces or as virtual machines, apart from this "
        "machine's own network.",
        epilog="example: python -m krelay_vm up && "
        "python -m krelay_vm exec client ip route && python -m krelay_vm down",
    )
    parser.add_version()
    parser.nouns = {"command": "command"}
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    up = commands.add_parser(
        "up",
        help="build a lab that stays",
        epilog="example: python -m krelay_vm up --client uml --relay netns --server qemu",
        allow_abbrev=False,
    )
    up.add_argument("--name", help="what to call it (default: made up)")
    up.add_argument(
        "--topology",
        metavar="FILE",
        type=Path,
        help="TOML: hosts and links (default: client, relay, server)",
    )

    up.add_argument(
        "--backend",
        choices=guest.BACKENDS,
        default=guest.BACKENDS[0],
        help="what the hosts sit on: a network namespace (default), a User-Mode Linux, an "
        "emulated PC",
    )
    up.add_argument(
        "--host",
        metavar="NAME=BACKEND",
        action="append",
        default=[],
        help="what this host sits on; or --NAME BACKEND, as in --client uml --server qemu",
    )

    run = commands.add_parser(
        "exec",
        help="run a command in a host, and end as it does",
        usage="python -m krelay_vm exec [-h] [--name NAME] HOST COMMAND...",
        epilog="example: python -m krelay_vm exec relay ip addr",
    )
    run.add_argument("--name", help="which lab (default: the only one that stays)")
    run.add_argument("host", metavar="HOST")
    run.add_argument("argv", metavar="COMMAND", nargs=argparse.REMAINDER)

    shell = commands.add_parser(
        "console",
        help="a shell on a host",
        epilog="example: python -m krelay_vm console server",
    )
    shell.add_argument("--name", help="which lab (default: the only one that stays)")
    shell.add_argument("host", metavar="HOST")

    capture = commands.add_parser(
        "capture",
        help="write what passes a link to a file, for Wireshark, until Ctrl-C",
        epilog="example: python -m krelay_vm capture client-relay client.pcapng",
    )
    capture.add_argument("--name", help="which lab (default: the only one that stays)")
    capture.add_argument("link", metavar="LINK", help="two hosts on it, client-relay")
    capture.add_argument("file", metavar="FILE", type=Path)

    commands.add_parser(
        "list", help="show the labs on this machine", epilog="example: python -m krelay_vm list"
    )

    down = commands.add_parser(
        "down", help="remove a lab", epilog="example: python -m krelay_vm down --stale"
    )
    which = down.add_mutually_exclusive_group()
    which.add_argument("--name", help="which lab (default: the only one that stays)")
    which.add_argument("--all", action="store_true", help="all that stay or were left behind")
    which.add_argument("--stale", action="store_true", help="those whose process was killed")
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
