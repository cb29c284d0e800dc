"""What the command prints, runs and returns, with findings that are made up."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from krelay.doctor import command
from krelay.doctor.findings import Finding, Level

GOOD = Finding("queue", Level.OK, "it is there")
SAFE = Finding("forwarding", Level.FAILED, "off", "echo mended", safe=True)
OTHERS = Finding("firewall", Level.WARNING, "dropped [by] `rule`", "nft insert rule x", safe=False)
BROKEN = Finding("buffer", Level.FAILED, "small", "echo no >&2; exit 3", safe=True)


def looks(monkeypatch: pytest.MonkeyPatch, *rounds: list[Finding]) -> None:
    """What is found, look by look."""
    found: Iterator[list[Finding]] = iter(rounds)
    monkeypatch.setattr(command, "look", lambda *_: next(found))


def test_a_line_each_and_1_only_if_something_failed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks(monkeypatch, [GOOD, OTHERS], [GOOD, SAFE])

    assert command.run(Path("/x")) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ok       queue         it is there",
        "warning  firewall      dropped [by] `rule`; mend: nft insert rule x",
    ]
    assert command.run(Path("/x")) == 1


def test_fix_runs_what_is_safe_says_so_and_looks_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks(monkeypatch, [SAFE, OTHERS, BROKEN, SAFE], [GOOD])

    assert command.run(Path("/x"), fix=True) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ran echo mended",
        "ran echo no >&2; exit 3: no",
        "ok       queue         it is there",
    ]


def test_json_is_an_object_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks(monkeypatch, [SAFE], [GOOD, OTHERS])

    assert command.run(Path("/x"), fix=True, as_json=True) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"ran": "echo mended", "failure": None},
        {"check": "queue", "level": "ok", "text": "it is there", "mend": None, "safe": False},
        {
            "check": "firewall",
            "level": "warning",
            "text": "dropped [by] `rule`",
            "mend": "nft insert rule x",
            "safe": False,
        },
    ]


def test_colour_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = []
    for terminal in (True, False):
        out = io.StringIO()
        console = Console(file=out, force_terminal=terminal, highlight=False, width=200)
        console.print(command.line(SAFE))
        shown.append(out.getvalue())

    assert shown[0].startswith("\x1b[1;31mfailed ")
    assert "off; mend: " in shown[0].replace("\x1b[0m", "")
    assert shown[1] == "failed   forwarding    off; mend: echo mended\n"
