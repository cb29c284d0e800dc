"""What can be typed: the commands, their options, and what reads them.

Every command has an example in its help.
"""

import argparse
import os
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address
from pathlib import Path

from knet import log, relayoptions
from knet.usage import CommandParser
from krelay.cli import serve, settings, show, upkeep
from krelay.rules import DEFAULT_QUEUE
from procfs_sim.tree import DEFAULT_ROOT, ROOT_VARIABLE, SETTINGS, SettingRefused, server

WITHOUT_TREE = ("demo",)
"""Commands that serve a tree of their own."""


def parser() -> CommandParser:
    """The parser of `krelay`.

    What it reads has `run`, the function of the command, `parser`, the command's own, and `root`,
    None where it was not given (`tree`).
    """
    parser = CommandParser(
        prog="krelay",
        description="A relay that stands in front of a real server and keeps the client's address.",
        epilog="example: krelay up --real-ip 192.168.0.1\n\n"
        "`krelay COMMAND --help` shows the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_version()
    _root_option(parser, default=None)
    parser.nouns = {"command": "command"}
    commands = parser.add_subparsers(dest="command", title="commands", metavar="COMMAND")

    def add(
        name: str,
        run: Callable[[argparse.Namespace], int],
        text: str,
        example: str,
        parents: Sequence[CommandParser] = (),
    ) -> CommandParser:
        sub = commands.add_parser(
            name,
            parents=parents,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run, parser=sub)
        if name not in WITHOUT_TREE:
            _root_option(sub, default=argparse.SUPPRESS)  # one before the command stays
        return sub

    sub = add("daemon", serve.daemon, "serve in the foreground", "krelay daemon --log-level debug")
    _queue_option(sub)
    sub.add_argument(
        "--relay-gid",
        type=_group_id,
        metavar="GID",
        help="the number of the group that may use relay.sock (default: that of the group krelay)",
    )
    log.add_options(sub)

    sub = add(
        "up",
        serve.up,
        "daemon and tcp-relay together, until Ctrl-C",
        "krelay up --real-ip 192.168.0.1 --services tcp/80 udp/53",
        parents=[_relay_options()],
    )
    _values(sub)
    sub.add_argument("--datapath", metavar="PATH", help="what rewrites packets: auto, queue")
    _queue_option(sub)
    log.add_level_option(sub)
    _doctor_option(sub)

    sub = add(
        "start", settings.start, "start relaying, and wait until it is in force", "krelay start"
    )
    _doctor_option(sub)
    add(
        "stop",
        settings.stop,
        "stop relaying, and wait until the host is as before",
        "krelay stop",
    )

    sub = add(
        "set",
        settings.set_value,
        "check and write a setting, wait for it",
        "krelay set gport 17000",
    )
    sub.nouns = {"key": "setting"}
    sub.add_argument("key", metavar="KEY", choices=SETTINGS, help=", ".join(SETTINGS))
    sub.add_argument("value", metavar="VALUE", nargs="+", help="services may be several words")
    sub.add_argument(
        "--flush",
        action="store_true",
        help="real_ip: end the flows that still lead to another server",
    )
    _doctor_option(sub)

    sub = add("get", settings.get_value, "show a setting, or all", "krelay get real_ip")
    sub.nouns = {"key": "setting"}
    sub.add_argument("key", metavar="KEY", nargs="?", choices=SETTINGS, help=", ".join(SETTINGS))

    sub = add(
        "status", show.status, "show the state, and what there is now", "krelay status state flows"
    )
    _names(sub)
    _json_option(sub)
    sub = add("nat", show.nat, "show the NAT table", "krelay nat proto=tcp client=10.0.0.1 --watch")
    _filters(sub)
    sub.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    _json_option(sub)
    sub = add("kill", show.kill, "end one flow; TCP: reset both sides", "krelay kill 17")
    sub.add_argument("id", metavar="ID", type=_flow_id, help="as `krelay nat` lists it")
    add(
        "flush",
        show.flush,
        "end the flows that lead to another server than real_ip; TCP: reset both sides",
        "krelay flush",
    )
    sub = add(
        "counters",
        show.counters,
        "show what was counted since the daemon began",
        "krelay counters T1 T2 --json",
    )
    _names(sub)
    _json_option(sub)
    sub = add(
        "trace",
        show.trace,
        "show each packet before and after",
        "krelay trace service=tcp/80\n         krelay trace --pcap - | wireshark -k -i -",
    )
    _filters(sub, " verdict=rewrite,drop,pass (default: rewrite,drop)")
    sub.add_argument(
        "--pcap",
        metavar="FILE",
        help="capture into a pcapng file for Wireshark instead, until Ctrl-C; -: standard output",
    )
    sub = add(
        "doctor",
        upkeep.doctor,
        "check what relaying needs, and say how to fix what is wrong",
        "krelay doctor --client 10.0.0.1 --fix\n"
        "         krelay doctor --real-ip 192.168.0.1 --gport 17000",
    )
    _values(sub, "instead of the one in the file tree: ")
    sub.add_argument(
        "--client",
        type=_address,
        metavar="IP",
        help="also the way to this client, and whether the server's answers to it come back here",
    )
    sub.add_argument(
        "--fix",
        action="store_true",
        help="fix what is safe: kernel settings, what a killed krelay left; no rules of others",
    )
    _queue_option(sub)
    _json_option(sub)
    sub = add("clean", upkeep.clean, "remove all that a killed krelay left", "krelay clean")
    sub.add_argument("--keep-settings", action="store_true", help="leave the files of the settings")
    sub = add(
        "demo", upkeep.demo, "client, relay and server on this machine, step by step", "krelay demo"
    )
    sub.add_argument(
        "--keep",
        action="store_true",
        help="relay again at the end, and wait for Enter before cleaning up",
    )
    sub.add_argument(
        "--vm",
        choices=("uml", "qemu"),
        help="hosts are virtual machines: User-Mode Linux, or emulated PCs with Debian's kernel",
    )
    return parser


def tree(args: argparse.Namespace) -> Path:
    """The file tree that was named, or $KRELAY_ROOT, or the usual one."""
    return args.root or Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT)


def _root_option(parser: argparse.ArgumentParser, default: str | None) -> None:
    parser.add_argument(
        "--root",
        type=_folder,
        default=default,
        metavar="DIR",
        help=f"the file tree (default: ${ROOT_VARIABLE} or {DEFAULT_ROOT})",
    )


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty name is no folder's")
    return Path(text)


def _relay_options() -> CommandParser:
    """Those of tcp-relay that `krelay up` takes as well."""
    parser = CommandParser(add_help=False)
    relayoptions.add_relay_options(parser)
    return parser


def _queue_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--queue-num",
        type=_queue_number,
        default=DEFAULT_QUEUE,
        metavar="N",
        help=f"the netfilter queue (default: {DEFAULT_QUEUE})",
    )


def _queue_number(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 0xFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not a queue number (0-65535)")
    return int(text)


def _group_id(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) >= 0xFFFFFFFF:
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a group")
    return int(text)


def _flow_id(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of a flow, a number")
    return int(text)


def _address(text: str) -> IPv4Address:
    try:
        return server(text)
    except SettingRefused as reason:
        text = str(reason).partition(",")[0]
        raise argparse.ArgumentTypeError(text.replace("the server's", "the client's")) from None


def _values(parser: argparse.ArgumentParser, what: str = "") -> None:
    """Settings, to be put in force or to be looked at."""
    parser.add_argument("--real-ip", metavar="IP", help=f"{what}the real server")
    parser.add_argument("--gport", metavar="N", help=f"{what}the gateway port")
    parser.add_argument(
        "--services",
        metavar="SERVICE",
        nargs="+",
        help=f"{what}what is relayed, like tcp/80 udp/53",
    )
    parser.add_argument(
        "--source", metavar="WHOSE", help=f"{what}the address the server sees: client, relay"
    )


def _names(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="*", metavar="NAME", help="these values alone")


def _doctor_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-doctor",
        action="store_true",
        help="don't look for what is wrong on this host (krelay doctor does)",
    )


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")


def _filters(parser: CommandParser, more: str = "") -> None:
    text = f"proto=tcp|udp client=ADDR[:PORT] state=STATE service=tcp/80{more}"
    parser.further = [f"{word.partition('=')[0]}=" for word in text.split() if "=" in word]
    parser.add_argument("filter", nargs="*", metavar="FILTER", help=text)
