"""`krelay doctor` itself, and what `krelay start` and `krelay up` say before the first packet."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path

from rich.text import Text

from krelay import children, ruleset, terminal
from krelay.doctor import checks, probe
from krelay.doctor.facts import Facts
from krelay.doctor.findings import Finding, Level
from krelay.doctor.gather import gather

STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.FAILED: "bold red"}
MEND_WITHIN = 30.0
"""Seconds for one mend."""
_WIDTH = 12


def run(
    root: Path,
    client: IPv4Address | None = None,
    queue_num: int = ruleset.DEFAULT_QUEUE,
    *,
    fix: bool = False,
    as_json: bool = False,
) -> int:
    """Looks, shows, with `fix` mends what is safe and looks again; 1 if something has failed."""
    findings = look(root, client, queue_num)
    if fix and (mends := list(dict.fromkeys(f.mend for f in findings if f.safe and f.mend))):
        for mend in mends:
            failure = _mend(mend)
            if as_json:
                print(json.dumps({"ran": mend, "failure": failure}))
            else:
                print(f"ran {mend}" + (f": {failure}" if failure else ""))
        findings = look(root, client, queue_num)
    if as_json:
        for finding in findings:
            print(json.dumps(as_values(finding)))
    else:
        console = terminal.console()
        for finding in findings:
            console.print(line(finding), soft_wrap=True)
    return int(any(finding.level is Level.FAILED for finding in findings))


def look(
    root: Path, client: IPv4Address | None = None, queue_num: int = ruleset.DEFAULT_QUEUE
) -> list[Finding]:
    """All findings, those of the probe included."""
    return checks.examine(_probed(gather(root, client, queue_num)))


def before_start(root: Path) -> list[Finding]:
    """What would keep relaying from beginning or from working: all that has failed.

    Nothing is sent.  The daemon runs already: it has the privileges, whoever asks it to start; and
    that it has failed before is why it is asked again.
    """
    findings = checks.examine(gather(root))
    known = ("privileges", "krelay")
    return [f for f in findings if f.level is Level.FAILED and f.check not in known]


def say(findings: Iterable[Finding]) -> None:
    """On stderr, for the commands that start relaying."""
    for finding in findings:
        print(f"{finding.level}  {finding.check}  {finding}", file=sys.stderr, flush=True)


def line(finding: Finding) -> Text:
    """A finding as people see it."""
    text = Text().append(f"{finding.level:7}  ", STYLES[finding.level])
    text.append(f"{finding.check:{_WIDTH}}  ", "bold")
    text.append(finding.text)
    if finding.mend:
        text.append("; mend: ").append(finding.mend, "cyan")
    return text


def as_values(finding: Finding) -> dict[str, object]:
    """A finding for programs."""
    return {
        "check": finding.check,
        "level": str(finding.level),
        "text": finding.text,
        "mend": finding.mend or None,
        "safe": finding.safe,
    }


def _probed(facts: Facts) -> Facts:
    if not probe.is_needed(facts):
        return facts
    try:
        return replace(facts, returned=probe.probe(facts))
    except OSError as error:
        return replace(facts, problems=(*facts.problems, ("return", str(error))))


def _mend(command: str) -> str | None:
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
            timeout=MEND_WITHIN,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
