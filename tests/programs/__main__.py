"""The command: `python -m tests.programs`, as root.

Ends with status 0 if every program that could be tried went in every way as it does directly, or
fails as the table says; 1 if not, 2 for wrong usage, 130 after Ctrl-C.
"""

import argparse
import io
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from krelay_vm import LabError
from tests.programs import packages, runner
from tests.programs.report import Row, as_json, page
from tests.programs.table import CLIENTS, Client
from tests.programs.ways import DATAPATHS, SOURCES, ways


def main(argv: Sequence[str] | None = None) -> int:
    """Tries what is asked for; the exit status."""
    args = _parser().parse_args(argv)
    if args.setup:
        return packages.set_up()
    chosen = [client for client in CLIENTS if not args.only or _is_named(client, args.only)]
    if args.list:
        for client in chosen:
            print(f"{client.name:34} {client.transport}  {client.server:12} {client.package}")
        return 0
    if not chosen:
        print(f"tests.programs: no program is called {', '.join(args.only)}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("tests.programs: needs root (network namespaces)", file=sys.stderr)
        return 1
    try:
        flows = _run(chosen, args.datapath or DATAPATHS, args.source or SOURCES)
    except KeyboardInterrupt:
        return 130
    except LabError as error:
        print(f"tests.programs: {error}", file=sys.stderr)
        return 1
    if args.json:
        text = json.dumps([as_json(flow) for flow in flows], indent=1)
        print(text) if args.json == "-" else Path(args.json).write_text(text + "\n")
    if args.markdown:
        text = page(flows, _machine())
        print(text, end="") if args.markdown == "-" else Path(args.markdown).write_text(text)
    return _summary(flows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.programs",
        description="Runs real programs through the relay, each beside itself without it.",
        epilog="example: python -m tests.programs --only curl --datapath auto",
    )
    parser.add_argument("--setup", action="store_true", help="install the programs, and end")
    parser.add_argument("--list", action="store_true", help="show the programs, and end")
    parser.add_argument(
        "--only", action="append", metavar="NAME",
        help="those whose name, server or package is or begins with this; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--datapath", choices=DATAPATHS, action="append", help="just this data path"
    )
    parser.add_argument("--source", choices=SOURCES, action="append", help="just this source")
    parser.add_argument(
        "--json", metavar="FILE", help="write all results there; -: standard output"
    )
    parser.add_argument(
        "--markdown", metavar="FILE", help="write the page there; -: standard output"
    )
    return parser


def _is_named(client: Client, names: Sequence[str]) -> bool:
    """Whether one of these names is meant for it.

    >>> dig = next(client for client in CLIENTS if client.name == "dig")
    >>> [_is_named(dig, [name]) for name in ("DIG", "nsd", "bind9-dnsutils", "digger")]
    [True, True, True, False]
    """
    return any(
        client.name.lower().startswith(name.lower()) or name in (client.server, client.package)
        for name in names
    )


def _run(clients: Sequence[Client], datapaths: Sequence[str], sources: Sequence[str]) -> list[Row]:
    began = time.monotonic()

    def tell(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line}", file=sys.stderr, flush=True)

    flows = []
    with redirect_stdout(io.StringIO()):  # the world's last words are for pytest
        for flow in runner.run(clients, list(ways(datapaths, sources)), tell):
            flows.append(flow)
            if flow.untried:
                tell(f"{flow.client.name}: not tried: {flow.untried}")
    return flows


def _machine() -> str:
    release = platform.freedesktop_os_release()["PRETTY_NAME"]
    return f"Tried on {release} with Linux {platform.release()}."


def _summary(flows: Sequence[Row]) -> int:
    bad = [flow.client.name for flow in flows if not flow.is_as_expected]
    untried = [flow.client.name for flow in flows if flow.untried]
    known = [flow.client.name for flow in flows if flow.client.fails and flow.troubles]
    print(f"{len(flows)} programs, {len(bad)} not as directly: {', '.join(bad) or 'none'}")
    if known:
        print(f"as known: {', '.join(known)}")
    if untried:
        print(f"not tried: {', '.join(untried)}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
