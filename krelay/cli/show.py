"""`krelay status`, `counters`, `nat`, `trace`, `kill`, `flush`: what the daemon is asked."""

import argparse
import json
import time
from collections.abc import Sequence

from knet.usage import meant
from krelay.cli.asking import Failed, Misused, ask, print_lines


def status(args: argparse.Namespace) -> int:
    """`krelay status`.  Raises Failed, Misused."""
    return _show_values(args, "show status")


def counters(args: argparse.Namespace) -> int:
    """`krelay counters`.  Raises Failed, Misused."""
    return _show_values(args, "show counters")


def nat(args: argparse.Namespace) -> int:
    """`krelay nat`, once or until Ctrl-C.  Raises Failed, Misused."""
    _check_words(args.filter)
    request = " ".join(["show nat json", *args.filter])
    if args.json:
        print_lines(ask(args.root, request))
        return 0
    from rich.live import Live
    from rich.table import Table

    from knet import terminal
    from krelay.cli import tables

    console = terminal.console()
    flows = [*map(json.loads, ask(args.root, request))]
    if not args.watch:
        terminal.show(console, tables.nat_table(flows))
        return 0
    rates = tables.Rates()

    def table() -> Table:
        rates.seen(flows, time.monotonic())
        return tables.watch_table(flows, rates, *terminal.size(console))

    with Live(table(), console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            time.sleep(1)
            flows = [*map(json.loads, ask(args.root, request))]
            live.update(table(), refresh=True)


def kill(args: argparse.Namespace) -> int:
    """`krelay kill`.  Raises Failed."""
    print_lines(ask(args.root, f"kill {args.id}"))
    return 0


def flush(args: argparse.Namespace) -> int:
    """`krelay flush`.  Raises Failed."""
    print_lines(ask(args.root, "flush"))
    return 0


def trace(args: argparse.Namespace) -> int:
    """`krelay trace`, until Ctrl-C.  Raises Failed, Misused."""
    from knet import terminal
    from krelay.cli import capturing, starting, tables
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
                console.print(tables.trace_line(line), soft_wrap=True)
            else:
                print(line, flush=True)
    except BrokenPipeError:
        raise
    except (client.NoDaemon, client.Rejected, capturing.CaptureFailed, OSError) as error:
        raise Failed(error) from None
    raise Failed("krelay has ended")


def _show_values(args: argparse.Namespace, request: str) -> int:
    answer = ask(args.root, f"{request} json")[0]
    values = json.loads(answer)
    if args.name:
        for name in args.name:
            if name not in values:
                kind = "counter" if args.command == "counters" else "value"
                raise Misused(f"no {kind} {name!r}{meant(name, values)}")
        values = {name: values[name] for name in args.name}
        answer = json.dumps(values)
    if args.json:
        print(answer)
    else:
        from knet import terminal
        from krelay.cli import tables

        terminal.console().print(tables.listing(values), soft_wrap=True)
    return 0


def _check_words(words: Sequence[str], *, is_trace: bool = False) -> None:
    """Raises Misused for filters that krelay would refuse."""
    from krelay.control import commands

    try:
        if is_trace:
            commands.parse_trace(words)
        else:
            commands.parse_filter(words)
    except commands.BadRequest as reason:
        raise Misused(reason) from None
