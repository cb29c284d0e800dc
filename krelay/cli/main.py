"""The command line: what can be typed, checked before anything is done.

Every command has an example in its help.  What a user can cause is one line on stderr and exit
status 1; wrong usage is 2, Ctrl-C 130.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from ipaddress import IPv4Address
from pathlib import Path

from knet import log, trust
from procfs_sim import ondisk
from procfs_sim.ondisk import FileTree
from procfs_sim.tree import (
    DEFAULT_ROOT,
    ROOT_VARIABLE,
    SETTINGS,
    SettingRefused,
    parse,
    render,
    server,
)

IN_FORCE_WITHIN = 5.0
"""Seconds that a command waits for a value to be in force; normally it takes milliseconds."""
_PAUSE = 0.01


class Failed(Exception):
    """The command failed.  The text is the one line that says why and what to do."""


class Misused(Exception):
    """The command was written wrongly.  The text says how."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status."""
    try:
        args = _parser().parse_args(argv)
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


def _daemon(args: argparse.Namespace) -> int:
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


def _up(args: argparse.Namespace) -> int:
    from krelay.cli import up
    from krelay.control import client

    given = {"real_ip": args.real_ip, "gport": args.gport}
    given |= {"services": _joined(args.services), "source": args.source, "datapath": args.datapath}
    values = {name: _checked(name, text) for name, text in given.items() if text is not None}
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


def _relay_options() -> argparse.ArgumentParser:
    """Those of tcp-relay that `krelay up` takes as well."""
    from tcp_relay.service import options

    parser = argparse.ArgumentParser(add_help=False)
    options.add_relay_options(parser)
    return parser


def _relay_arguments(args: argparse.Namespace) -> Iterator[str]:
    """What of these was asked for, as tcp-relay reads it."""
    for name, default in vars(_relay_options().parse_args([])).items():
        value = getattr(args, name)
        if value == default:
            continue
        yield f"--{name.replace('_', '-')}"
        if value is not True:
            yield str(value)


def _start(args: argparse.Namespace) -> int:
    from krelay.doctor import command as doctor

    ondisk.check(args.root)
    _ask(args.root, "show status json")
    fatal = [] if args.no_doctor else doctor.before_start(args.root)
    try:
        if fatal:
            raise Failed(fatal[0])
        _switch(args.root, "1", "running")
    except Failed:  # which says itself what became of krelay
        _say_what_matters(args, but=fatal[:1], but_of=("krelay",))
        raise
    _say_what_matters(args)
    return 0


def _say_what_matters(
    args: argparse.Namespace, but: Sequence[object] = (), but_of: Sequence[str] = ()
) -> None:
    """What the doctor finds; relaying goes on meanwhile."""
    from krelay.doctor import command as doctor

    if not args.no_doctor:
        doctor.say(
            each
            for each in doctor.after_start(args.root)
            if each not in but and each.check not in but_of
        )


def _stop(args: argparse.Namespace) -> int:
    return _switch(args.root, "0", "stopped")


def _switch(root: Path, flag: str, state: str) -> int:
    ondisk.check(root)
    _ask(root, "show status json")
    _put(root, "start", flag)
    for _ in _tries():
        status = json.loads(_ask(root, "show status json")[0])["state"]
        in_force = json.loads(_ask(root, "show config json")[0])["start"] == flag
        if in_force and status == state:
            return 0
        if in_force and status.startswith("failed: ") and flag == "1":
            raise Failed(status.removeprefix("failed: "))
    raise Failed(f"not {state} after {IN_FORCE_WITHIN:.0f} seconds; see the daemon's log")


def _set(args: argparse.Namespace) -> int:
    from krelay.cli import starting
    from krelay.control import client

    if args.flush and args.key != "real_ip":
        raise Misused("--flush goes with real_ip alone")
    if len(args.value) > 1 and args.key != "services":
        raise Misused(f"{args.key} has one value, not {len(args.value)}")
    text = _checked(args.key, " ".join(args.value))
    starting.wait(args.root)
    _put(args.root, args.key, text)
    for _ in _tries():
        try:
            in_force = client.ask_json(args.root, "show config json")[0][args.key]
        except client.NoDaemon:
            print(
                f"{args.key} is written; no krelay serves {args.root}, the next one will heed it",
                file=sys.stderr,
            )
            return 0
        except (client.Rejected, OSError) as error:
            raise Failed(f"{args.key} is written, but krelay doesn't answer: {error}") from None
        shown = (FileTree(args.root).read(args.key) or "").strip()
        if in_force == text:
            if args.flush:
                _print(_ask(args.root, "flush"))
            _say_what_matters(args)
            return 0
        if shown == in_force:  # it shows the value in force again: ours was refused
            errors = (FileTree(args.root).read("status/errors") or "").splitlines()
            ours = [line for line in errors if line.startswith(f"{args.key}: ")]
            if ours:
                raise Failed(ours[0])
    raise Failed(f"{args.key} isn't in force after {IN_FORCE_WITHIN:.0f} seconds")


def _get(args: argparse.Namespace) -> int:
    from krelay.cli import starting

    tree = FileTree(args.root)
    if not (args.root / "start").exists():
        starting.wait(args.root)
    names = [args.key] if args.key else list(SETTINGS)
    for name in names:
        text = tree.read(name)
        if text is None:
            raise Failed(f"there is no {args.root / name}; start a krelay, it makes the file tree")
        print(text.strip() if args.key else f"{name}={text.strip()}")
    return 0


def _status(args: argparse.Namespace) -> int:
    return _show_values(args, "show status")


def _counters(args: argparse.Namespace) -> int:
    return _show_values(args, "show counters")


def _show_values(args: argparse.Namespace, request: str) -> int:
    answer = _ask(args.root, f"{request} json")[0]
    if args.json:
        print(answer)
    else:
        from krelay.cli import terminal

        terminal.console().print(terminal.listing(json.loads(answer)), soft_wrap=True)
    return 0


def _flush(args: argparse.Namespace) -> int:
    _print(_ask(args.root, "flush"))
    return 0


def _check_words(words: Sequence[str], *, is_trace: bool = False) -> None:
    """Raises Misused for filters that krelay would refuse."""
    from krelay.control import language

    try:
        if is_trace:
            language.parse_trace(words)
        else:
            language.parse_filter(words)
    except language.BadRequest as reason:
        raise Misused(reason) from None


def _nat(args: argparse.Namespace) -> int:
    _check_words(args.filter)
    request = " ".join(["show nat json", *args.filter])
    if args.json:
        _print(_ask(args.root, request))
        return 0
    from rich.live import Live
    from rich.table import Table

    from krelay.cli import terminal

    console = terminal.console()
    flows = [*map(json.loads, _ask(args.root, request))]
    if not args.watch:
        terminal.show(console, terminal.nat_table(flows))
        return 0
    rates = terminal.Rates()

    def table() -> Table:
        rates.seen(flows, time.monotonic())
        return terminal.watch_table(flows, rates, *terminal.size(console))

    with Live(table(), console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            time.sleep(1)
            flows = [*map(json.loads, _ask(args.root, request))]
            live.update(table(), refresh=True)


def _kill(args: argparse.Namespace) -> int:
    _print(_ask(args.root, f"kill {args.id}"))
    return 0


def _print(lines: Sequence[str]) -> None:
    for line in lines:
        print(line)


def _trace(args: argparse.Namespace) -> int:
    from krelay.cli import capturing, starting, terminal
    from krelay.control import client

    _check_words(args.filter, is_trace=True)
    starting.wait(args.root)
    try:
        if args.pcap is not None:
            request = " ".join(["trace pcap", *args.filter])
            return capturing.run(args.root, request, args.pcap)
        console = terminal.console()
        for line in client.follow(args.root, " ".join(["trace", *args.filter])):
            if console.is_terminal:
                console.print(terminal.trace_line(line), soft_wrap=True)
            else:
                print(line, flush=True)
    except BrokenPipeError:
        raise
    except (client.NoDaemon, client.Rejected, capturing.CaptureFailed, OSError) as error:
        raise Failed(error) from None
    raise Failed("krelay has ended")


def _clean(args: argparse.Namespace) -> int:
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


def _doctor(args: argparse.Namespace) -> int:
    from krelay.cli import starting
    from krelay.doctor import command

    given = {
        "real_ip": args.real_ip,
        "gport": args.gport,
        "services": _joined(args.services),
        "source": args.source,
    }
    texts = {name: _checked(name, text) for name, text in given.items() if text is not None}
    asked = {name: parse(name, text) for name, text in texts.items()}
    if starting.is_starting(args.root):
        starting.wait(args.root)
    return command.run(
        args.root, args.client, args.queue_num, asked, fix=args.fix, as_json=args.json
    )


def _demo(args: argparse.Namespace) -> int:
    from krelay.demo import play

    return play.run(args)


def _tries() -> Iterator[None]:
    """Goes on for IN_FORCE_WITHIN, with pauses."""
    deadline = time.monotonic() + IN_FORCE_WITHIN
    while time.monotonic() < deadline:
        yield
        time.sleep(_PAUSE)


def _checked(name: str, text: str) -> str:
    try:
        return render(name, parse(name, text))
    except SettingRefused as reason:
        raise Failed(f"{name}: {reason}") from None


def _put(root: Path, name: str, text: str) -> None:
    """Writes a setting as `echo` does.  Raises Untrusted if others can change the tree."""
    path = root / name
    ondisk.check(root)
    try:
        FileTree(root).put(name, text + "\n")
    except FileNotFoundError:
        raise Failed(f"there is no {path}; start a krelay, it makes the file tree") from None
    except trust.Untrusted:
        raise
    except OSError as error:
        mend = "; run as root" if isinstance(error, PermissionError) else ""
        raise Failed(f"{path} can't be written: {error.strerror}{mend}") from None


def _joined(words: Sequence[str] | None) -> str | None:
    """The text of a setting that may be written as several words."""
    return None if words is None else " ".join(words)


def _ask(root: Path, request: str) -> list[str]:
    from krelay.cli import starting
    from krelay.control import client

    try:
        return starting.answered(root, lambda: client.ask(root, request))
    except (client.NoDaemon, client.Rejected) as error:
        raise Failed(error) from None
    except OSError as error:
        raise Failed(f"no answer from the krelay that serves {root}: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="krelay",
        description="A relay that stands in front of a real server and keeps the client's address.",
        epilog="example: krelay up --real-ip 192.168.0.1",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        name: str,
        run: Callable[[argparse.Namespace], int],
        text: str,
        example: str,
        parents: Sequence[argparse.ArgumentParser] = (),
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            parents=parents,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: {example}",
        )
        sub.set_defaults(run=run, parser=sub)
        if name != "demo":
            sub.add_argument(
                "--root",
                type=Path,
                default=Path(os.environ.get(ROOT_VARIABLE) or DEFAULT_ROOT),
                metavar="DIR",
                help=f"the file tree (default: ${ROOT_VARIABLE} or {DEFAULT_ROOT})",
            )
        return sub

    sub = add("daemon", _daemon, "serve in the foreground", "krelay daemon --log-level debug")
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
        _up,
        "daemon and tcp-relay together, until Ctrl-C",
        "krelay up --real-ip 192.168.0.1 --services tcp/80 udp/53",
        parents=[_relay_options()],
    )
    _values(sub)
    sub.add_argument("--datapath", metavar="PATH", help="what rewrites packets: auto, queue")
    _queue_option(sub)
    sub.add_argument("--log-level", choices=log.LEVELS, default="info", metavar="LEVEL")
    _doctor_option(sub)

    sub = add("start", _start, "write 1 into start and wait until relaying", "krelay start")
    _doctor_option(sub)
    add("stop", _stop, "write 0 into start and wait until the host is as before", "krelay stop")

    sub = add("set", _set, "check and write a setting, wait for it", "krelay set gport 17000")
    sub.add_argument("key", metavar="KEY", choices=SETTINGS, help=", ".join(SETTINGS))
    sub.add_argument("value", metavar="VALUE", nargs="+", help="services may be several words")
    sub.add_argument(
        "--flush",
        action="store_true",
        help="real_ip: end the flows that still lead to another server",
    )
    _doctor_option(sub)

    sub = add("get", _get, "show a setting, or all", "krelay get real_ip")
    sub.add_argument("key", metavar="KEY", nargs="?", choices=SETTINGS, help=", ".join(SETTINGS))

    sub = add("status", _status, "show how things are", "krelay status --json")
    _json_option(sub)
    sub = add("nat", _nat, "show the NAT table", "krelay nat proto=tcp client=10.0.0.1 --watch")
    _filters(sub)
    sub.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")
    _json_option(sub)
    sub = add("kill", _kill, "end one flow; TCP: reset both sides", "krelay kill 17")
    sub.add_argument("id", metavar="ID", type=_flow_id, help="as `krelay nat` lists it")
    add(
        "flush",
        _flush,
        "end the flows that lead to another server than real_ip; TCP: reset both sides",
        "krelay flush",
    )
    sub = add("counters", _counters, "show all counters", "krelay counters")
    _json_option(sub)
    sub = add(
        "trace",
        _trace,
        "show each packet before and after",
        "krelay trace service=tcp/80, krelay trace --pcap - | wireshark -k -i -",
    )
    _filters(sub, " verdict=rewrite,drop,pass (default: rewrite,drop)")
    sub.add_argument(
        "--pcap",
        metavar="FILE",
        help="capture into a pcapng file for Wireshark instead, until Ctrl-C; -: standard output",
    )
    sub = add(
        "doctor",
        _doctor,
        "check what relaying needs, and say how to mend what is wrong",
        "krelay doctor --client 10.0.0.1 --fix, krelay doctor --real-ip 192.168.0.1 --gport 17000",
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
        help="mend what is safe: kernel settings, what a killed krelay left; no rules of others",
    )
    _queue_option(sub)
    _json_option(sub)
    sub = add("clean", _clean, "remove all that a killed krelay left", "krelay clean")
    sub.add_argument("--keep-settings", action="store_true", help="leave the files of the settings")
    sub = add(
        "demo", _demo, "client, relay and server on this machine, step by step", "krelay demo"
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


def _queue_option(parser: argparse.ArgumentParser) -> None:
    from krelay.rules.ruleset import DEFAULT_QUEUE

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
        raise argparse.ArgumentTypeError(f"{text!r} is not the id of a row, a number")
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


def _doctor_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-doctor",
        action="store_true",
        help="don't look for what is wrong on this host (krelay doctor does)",
    )


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="for programs")


def _filters(parser: argparse.ArgumentParser, more: str = "") -> None:
    parser.add_argument(
        "filter",
        nargs="*",
        metavar="FILTER",
        help=f"proto=tcp|udp client=ADDR[:PORT] state=STATE service=tcp/80{more}",
    )
