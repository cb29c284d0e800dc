"""`krelay doctor` itself, and what `krelay start` and `krelay up` say before the first packet."""

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rich.console import Console
from rich.text import Text

from knet import children, terminal
from krelay.control import client as control
from krelay.doctor import checks, probe
from krelay.doctor.facts import Facts
from krelay.doctor.findings import Finding, Level
from krelay.doctor.gather import gather
from krelay.host import processes, treelock
from krelay.rules import DEFAULT_QUEUE

STYLES = {
    Level.OK: "green",
    Level.NOT_TRIED: "dim",
    Level.WARNING: "yellow",
    Level.FAILED: "bold red",
}
FIX_WITHIN = 30.0
"""Seconds for one fix."""
RELAY_WITHIN = 3.0
"""Seconds that a tcp-relay which has been started already may take until it serves."""
_HEAD = 21
"""Columns of a level and the name of a check."""
_PAUSE = 0.02


def run(
    root: Path,
    client: IPv4Address | None = None,
    queue_num: int = DEFAULT_QUEUE,
    asked: Mapping[str, Any] = MappingProxyType({}),
    *,
    fix: bool = False,
    as_json: bool = False,
) -> int:
    """Looks and shows, after the safe fixes with `fix`; 1 if something has failed.

    `asked`: values of settings (by file) that are checked instead of those in the tree.
    """
    findings = look(root, client, queue_num, asked)
    if fix and (commands := list(dict.fromkeys(f.fix for f in findings if f.safe and f.fix))):
        for command in commands:
            failure = _run(command)
            if as_json:
                print(json.dumps({"ran": command, "failure": failure}))
            else:
                print(f"ran {command}" + (f": {failure}" if failure else ""))
        findings = look(root, client, queue_num, asked)
    if as_json:
        for finding in findings:
            print(json.dumps(as_values(finding)))
    else:
        _show(findings, terminal.console())
    return int(any(finding.level is Level.FAILED for finding in findings))


def look(
    root: Path,
    client: IPv4Address | None = None,
    queue_num: int = DEFAULT_QUEUE,
    asked: Mapping[str, Any] = MappingProxyType({}),
) -> list[Finding]:
    """All findings, those of the probe included."""
    return checks.examine(_probed(gather(root, client, queue_num, asked)))


def before_start(root: Path) -> list[Finding]:
    """Why relaying couldn't even begin, as far as that is seen within milliseconds.

    The daemon runs already, so it has the privileges, whoever asks it to start.
    """
    findings = checks.fatal(checks.examine(gather(root, cheap=True)))
    return [finding for finding in findings if finding.check != "privileges"]


def after_start(root: Path) -> list[Finding]:
    """What is wrong, failures and warnings, with what a running krelay has in force now.

    Nothing is sent.  A tcp-relay that is just being started is waited for.  Where no krelay is at
    work there is nothing to say.
    """
    if not treelock.is_served(root):
        return []
    _wait_for_tcp_relay(root)
    facts = gather(root)
    stopped = facts.state == "stopped"  # then it is no news that no process serves
    return [
        finding
        for finding in checks.mattering(checks.examine(facts))
        if finding.check != "privileges" and not (stopped and finding.check == "krelay")
    ]


def say(findings: Iterable[Finding]) -> None:
    """On stderr, for the commands that start relaying."""
    console = terminal.errors()
    if console.is_terminal:
        _show(findings, console)
        return
    for finding in findings:
        print(f"{finding.level}  {finding.check}  {finding}", file=sys.stderr, flush=True)


def line(finding: Finding, width: int | None = None) -> Text:
    """A finding as people see it, in lines of this many columns, or in one.

    A fix is broken so that a shell takes all its lines for one.
    """
    head = Text().append(f"{finding.level:7}  ", STYLES[finding.level])
    head.append(finding.check, "bold")
    head.append(" " * max(0, _HEAD - len(head)) + "  ")
    text = f"{finding.text}; fix:" if finding.fix else finding.text
    words = [Text(word) for word in text.split(" ")]
    command = [Text(word, "cyan") for word in terminal.shell_words(finding.fix)]
    if width is None:
        return head + Text(" ").join([*words, *command])
    return terminal.wrapped(head, words, command, width)


def _show(findings: Iterable[Finding], console: Console) -> None:
    width = console.width if console.is_terminal else None
    for finding in findings:
        console.print(line(finding, width), soft_wrap=True)


def _wait_for_tcp_relay(root: Path) -> None:
    deadline = time.monotonic() + RELAY_WITHIN
    while time.monotonic() < deadline:
        try:
            status = control.ask_json(root, "show status json")[0]
        except (control.NoDaemon, control.Rejected, OSError):
            return
        if status["tcp_relays"] or status["state"] != "running":
            return
        if not any(ours.name == processes.TCP_RELAY for ours in processes.running(root)):
            return
        time.sleep(_PAUSE)


def as_values(finding: Finding) -> dict[str, object]:
    """A finding for programs."""
    return {
        "check": finding.check,
        "level": str(finding.level),
        "text": finding.text,
        "fix": finding.fix or None,
        "mend": finding.fix or None,  # its name until now, for a release
        "safe": finding.safe,
    }


def _probed(facts: Facts) -> Facts:
    if not probe.is_needed(facts):
        return facts
    try:
        return replace(facts, returned=probe.probe(facts))
    except OSError as error:
        return replace(
            facts,
            problems=(*facts.problems, ("return", str(error))),
            unseen=(*facts.unseen, ("return", f"can't be asked: {error}")),
        )


def _run(command: str) -> str | None:
    """Runs it; what went wrong, or None.  `krelay` is the one that runs."""
    try:
        done = subprocess.run(
            (
                "sh",
                "-c",
                f'krelay() {{ {shlex.join(children.python("krelay"))} "$@"; }}; {command}',
            ),
            env=children.environment(),
            capture_output=True,
            text=True,
            timeout=FIX_WITHIN,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
