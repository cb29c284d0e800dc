"""What the command prints, runs and returns, with findings that are made up."""

import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from krelay.doctor import command
from krelay.doctor.findings import Finding, Level

GOOD = Finding("queue", Level.OK, "it is there")
SAFE = Finding("forwarding", Level.FAILED, "off", "echo fixed", safe=True)
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
        "warning  firewall      dropped [by] `rule`; fix: nft insert rule x",
    ]
    assert command.run(Path("/x")) == 1


def test_fix_runs_what_is_safe_says_so_and_looks_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks(monkeypatch, [SAFE, OTHERS, BROKEN, SAFE], [GOOD])

    assert command.run(Path("/x"), fix=True) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ran echo fixed",
        "ran echo no >&2; exit 3: no",
        "ok       queue         it is there",
    ]


def test_json_is_an_object_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks(monkeypatch, [SAFE], [GOOD, OTHERS])

    assert command.run(Path("/x"), fix=True, as_json=True) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == [
        {"ran": "echo fixed", "failure": None},
        {
            "check": "queue",
            "level": "ok",
            "text": "it is there",
            "fix": None,
            "mend": None,
            "safe": False,
        },
        {
            "check": "firewall",
            "level": "warning",
            "text": "dropped [by] `rule`",
            "fix": "nft insert rule x",
            "mend": "nft insert rule x",  # its former name
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
    assert "off; fix: " in shown[0].replace("\x1b[0m", "")
    assert shown[1] == "failed   forwarding    off; fix: echo fixed\n"


LONG = Finding(
    "firewall",
    Level.FAILED,
    "tcp from clients to port 16000 is dropped by the policy of nft chain inet guard input",
    "nft insert rule inet guard input tcp dport '{ 16000, 17000 }' accept && nft list ruleset",
)


@pytest.mark.parametrize("width", [30, 60, 80, 100])
def test_long_lines_break_between_words_at_the_terminals_width(width: int) -> None:
    lines = command.line(LONG, width).plain.split("\n")

    assert len(lines) > 1
    assert all(len(line) <= width for line in lines)
    assert lines[0].startswith("failed   firewall      ")
    joined = " ".join(line.removesuffix(" \\").strip() for line in lines)
    assert joined.split() == str(command.line(LONG).plain).split()


def test_a_mend_that_is_broken_is_still_one_command_of_a_shell() -> None:
    for width in range(30, 120):
        shown = command.line(LONG, width).plain
        typed = shown.partition("fix:")[2]
        assert shlex.split(typed.replace("\\\n", " ")) == shlex.split(LONG.fix)
        before, _, _ = shown.partition("fix:")
        assert "\\" not in before
        assert not shown.endswith("\\")


def test_what_is_longer_than_a_terminal_has_a_line_of_its_own() -> None:
    word = "x" * 70
    lines = command.line(Finding("server", Level.WARNING, f"a {word} b"), 60).plain.split("\n")

    assert [line.strip() for line in lines] == ["warning  server        a", word, "b"]


def test_nothing_breaks_when_piped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    looks(monkeypatch, [LONG, GOOD])
    command.run(Path("/x"))
    assert len(capsys.readouterr().out.splitlines()) == 2

    command.say([LONG, GOOD])
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_what_was_not_tried_is_no_ok_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    looks(monkeypatch, [Finding("firewall", Level.NOT_TRIED, "CAP_NET_ADMIN is wanting"), GOOD])

    assert command.run(Path("/x")) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("not tried  firewall    CAP_NET")
    assert first.index("CAP_NET") == second.index("it is there")


@pytest.mark.parametrize("width", [60, 80])
def test_a_terminal_gets_lines_of_its_width_from_doctor_and_from_what_start_says(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, no_color=True, width=width)
    for name in ("console", "errors"):
        monkeypatch.setattr(f"knet.terminal.{name}", lambda: console)
    looks(monkeypatch, [LONG, GOOD])
    command.run(Path("/x"))
    command.say([LONG])
    lines = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()

    assert max(map(len, lines)) <= width
    assert sum(line.startswith("failed   firewall      ") for line in lines) == 2
    assert sum(line.endswith(" \\") for line in lines) >= 2
