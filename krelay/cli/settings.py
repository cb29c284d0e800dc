"""`krelay start`, `stop`, `set`, `get`: the file tree, written and read."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from krelay.cli import asking
from krelay.cli.asking import Failed, Misused, ask, checked, print_lines, put, tries
from procfs_sim import ondisk
from procfs_sim.ondisk import FileTree
from procfs_sim.tree import SETTINGS


def start(args: argparse.Namespace) -> int:
    """`krelay start`.  Raises Failed."""
    from krelay.doctor import command as doctor

    ondisk.check(args.root)
    ask(args.root, "show status json")
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


def stop(args: argparse.Namespace) -> int:
    """`krelay stop`.  Raises Failed."""
    return _switch(args.root, "0", "stopped")


def set_value(args: argparse.Namespace) -> int:
    """`krelay set`.  Raises Failed, Misused."""
    from krelay.cli import starting
    from krelay.control import client

    if args.flush and args.key != "real_ip":
        raise Misused("--flush goes with real_ip alone")
    if len(args.value) > 1 and args.key != "services":
        raise Misused(f"{args.key} has one value, not {len(args.value)}")
    text = checked(args.key, " ".join(args.value))
    starting.wait(args.root)
    put(args.root, args.key, text)
    for _ in tries():
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
                print_lines(ask(args.root, "flush"))
            _say_what_matters(args)
            return 0
        if shown == in_force:  # it shows the value in force again: ours was refused
            errors = (FileTree(args.root).read("status/errors") or "").splitlines()
            ours = [line for line in errors if line.startswith(f"{args.key}: ")]
            if ours:
                raise Failed(ours[0])
    raise Failed(f"{args.key} isn't in force after {asking.IN_FORCE_WITHIN:.0f} seconds")


def get_value(args: argparse.Namespace) -> int:
    """`krelay get`.  Raises Failed."""
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


def _switch(root: Path, flag: str, state: str) -> int:
    ondisk.check(root)
    ask(root, "show status json")
    put(root, "start", flag)
    for _ in tries():
        status = json.loads(ask(root, "show status json")[0])["state"]
        in_force = json.loads(ask(root, "show config json")[0])["start"] == flag
        if in_force and status == state:
            return 0
        if in_force and status.startswith("failed: ") and flag == "1":
            raise Failed(status.removeprefix("failed: "))
    raise Failed(f"not {state} after {asking.IN_FORCE_WITHIN:.0f} seconds; see the daemon's log")
