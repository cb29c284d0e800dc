"""The command: `python -m benchmarks`, as root, or `python -m benchmarks --micro` as anyone.

Ends with status 0 if everything was measured that this machine can measure, whether or not goals
are met; 1 if something failed, 2 for wrong usage, 130 after Ctrl-C.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks import dns, flows, idle, micro, proxies, udp
from benchmarks.figures import (
    Goal,
    Group,
    Series,
    as_json,
    by_quantity,
    from_json,
    goal_line,
    markdown,
    number,
)
from benchmarks.ground import CannotMeasure, Measurement, Progress, Wish, machine

RESULTS = Path(__file__).with_name("results")


class Part(NamedTuple):
    """Something that can be asked for by `--only`."""

    title: str
    measure: Measurement
    about: tuple[str, ...]
    goals: tuple[Goal, ...]
    needs_root: bool = True


PARTS = {
    "udp": Part(udp.TITLE, udp.measure, udp.about(), udp.GOALS),
    "dns": Part(dns.TITLE, dns.measure, dns.about(), dns.GOALS),
    "proxies": Part(proxies.TITLE, proxies.measure, proxies.about(), proxies.GOALS),
    "idle": Part(idle.TITLE, idle.measure, idle.about(), idle.GOALS),
    "flows": Part(flows.TITLE, flows.measure, flows.about(), flows.GOALS),
    "micro": Part(micro.TITLE, micro.measure, micro.about(), micro.GOALS, needs_root=False),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is asked for; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures krelay against its peers, by turns, and writes tables and plots.",
        epilog="example: python -m benchmarks --only udp --rounds 5",
    )
    parser.add_argument("--only", choices=PARTS, action="append", help="just this part; repeatable")
    parser.add_argument("--micro", action="store_true", help="short for --only micro: no root")
    parser.add_argument("--rounds", type=_count, default=3, help="readings of each (3)")
    parser.add_argument("--seconds", type=_seconds, default=2.0, help="seconds a reading (2)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="where results are written")
    asked = parser.parse_args(argv)
    wanted = [*(asked.only or ()), *(["micro"] if asked.micro else ())] or list(PARTS)
    if os.geteuid() != 0 and any(PARTS[name].needs_root for name in wanted):
        return _fail("needs root for network namespaces; try: sudo make bench, or --micro")
    try:
        asked.output.mkdir(parents=True, exist_ok=True)
        for name in PARTS:
            if name in wanted:
                group = _run(name, Wish(asked.rounds, asked.seconds))
                _show(group)
                _write(group, asked.output)
    except CannotMeasure as error:
        return _fail(str(error))
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror}")
    except KeyboardInterrupt:
        return 130
    print(f"\nwritten to {asked.output}")
    return 0


def _run(name: str, wish: Wish) -> Group:
    part, progress, about_machine = PARTS[name], Progress(name), machine()
    part.measure(wish, progress)
    return Group(
        key=name,
        title=part.title,
        about=part.about,
        series=tuple(Series(*at, tuple(values)) for at, values in progress.readings.items()),
        goals=part.goals,
        left_out=tuple(progress.left_out),
        machine=about_machine,
    )


def _show(group: Group) -> None:
    print(f"\n{group.title}")
    print("  " + ", ".join(f"{key} {value}" for key, value in group.machine.items()))
    width = max((len(series.name) for series in group.series), default=0)
    for comparable in by_quantity(group.series).values():
        for series in comparable:
            print(f"  {series.name:{width}}  {number(series.median):>10} {series.unit}")
    for goal in group.goals:
        print(f"  {goal_line(goal, group.series)}")
    for reason in group.left_out:
        print(f"  left out: {reason}")
    print(flush=True)


def _write(group: Group, output: Path) -> None:
    """Renews this group in the results; the others stay as they were measured."""
    file = output / "results.json"
    groups = _earlier(file) | {group.key: group}
    ordered = [groups[name] for name in PARTS if name in groups]
    file.write_text(json.dumps([as_json(each) for each in ordered], indent=2) + "\n")
    (output / "results.md").write_text(markdown(ordered))
    written = [output, file, output / "results.md"]
    if group.series:
        from benchmarks import plots  # matplotlib takes a second, and only now is it wanted

        written.append(output / f"{group.key}.svg")
        plots.draw(group, written[-1])
    _give_back(written)


def _earlier(file: Path) -> dict[str, Group]:
    """The groups of earlier runs; none if the file isn't one of ours."""
    try:
        return {plain["key"]: from_json(plain) for plain in json.loads(file.read_text())}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _give_back(paths: Sequence[Path]) -> None:
    """After `sudo` the results belong to whom the directory around them belongs."""
    owner = paths[0].parent.stat()
    if os.geteuid() == 0:
        for path in paths:
            os.chown(path, owner.st_uid, owner.st_gid)


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to 100")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 60:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.1 to 60")
    return value


def _fail(reason: str) -> int:
    print(f"benchmarks: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
