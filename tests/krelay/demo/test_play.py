"""`krelay demo`, as a person runs it: to its end, interrupted at any moment, and going wrong.

Things go wrong here as they do for people: programs are missing, or aren't what one thinks.  That
is arranged by way of PATH.
"""

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

from krelay.demo import play, servers
from krelay.demo.evidence import Cast
from krelay_vm import netns, registry

ROOT = Path(__file__).parents[3]
WITHIN = 60.0
"""Seconds for everything; it takes one or two."""
WITHIN_VM = 110.0
"""It takes twelve on User-Mode Linux, forty on emulated PCs."""

PROGRESS = (
    "krelay demo",
    "the hosts are wired",
    "server: nginx serves",
    "relay: krelay and tcp-relay run",
    "relay: switched on",
    "client: asks",
    "NAT table",
    "relay: switched off",
)
"""What is printed, in this order: the moments at which a person may have had enough."""

ADDRESSES = {"C": r"10\.0\.0\.1", "K": r"192\.168\.0\.2", "S": r"192\.168\.0\.1"}
SHOWN = (
    r"# echo S > /[^ ]+/real_ip",
    r"# echo 1 > /[^ ]+/start",
    r"\$ dig .*@K www\.demo\.example\n +192\.0\.2\.80\n",
    r"\$ curl .*http://K/\n +The server sees you as C:\d+\.\n",
    r"T1 +C:(\d+) > K:80 .*\n.*=> C:\1 > K:16000 ",
    r"T2 +K:16000 > C:(\d+) .*\n.*=> K:80 > C:\1 ",
    r"T3 +K:(\d+) > S:80 .*\n.*=> C:\1 > S:80 ",
    r"T4 +S:80 > C:(\d+) .*\n.*=> S:80 > K:\1 ",
    r"U1,U2 +C:(\d+) > K:53 .*\n.*=> C:\1 > S:53 ",
    r"U3,U4 +S:53 > C:(\d+) .*\n.*=> K:53 > C:\1 ",
    r"dnsmasq .*C/\d+ query\[A\] www\.demo\.example from C\n",
    r'nginx +C:\d+ "GET / HTTP/1\.1" 200\n',
    r"# echo 0 > /[^ ]+/start",
    r"\$ curl .*http://S/\n +The server sees you as C:\d+\.\n",
    r"✓ no rule is left on the relay\n",
)
"""What a person must read, as patterns; C, K and S stand for the addresses."""


@contextmanager
def running(*arguments: str, path: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """`krelay demo` as a program of its own, its output to be read; `path` comes first in PATH."""
    search = os.environ["PATH"] if path is None else f"{path}:{os.environ['PATH']}"
    with subprocess.Popen(
        [sys.executable, "-m", "krelay", "demo", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": search},
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What it prints up to and with the line that has this text in it."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:  # ends at the latest when the process does
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"it never printed {text!r}, but {''.join(lines)}")


def finish(process: subprocess.Popen[str], within: float = WITHIN) -> tuple[int, str, str]:
    """Its exit status and the rest of what it prints, after it has ended."""
    out, err = process.communicate(timeout=within)
    return process.returncode, out, err


def remains(pid: int, printed: str) -> list[str]:
    """What there still is of the lab that this process had."""
    left = [r.name for r in registry.records() if r.owner is not None and r.owner.pid == pid]
    for name in set(re.findall(r"krelay-[0-9a-f]{4}\b", printed)):
        left += [str(path) for path in netns.RUN.glob(f"{name}*")]
        left += [str(path) for path in (Path(tempfile.gettempdir()) / name,) if path.exists()]
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                command = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if name in command:
                left.append(command)
    return left


def tool(directory: Path, name: str, script: str) -> None:
    """A program of that name which does something else."""
    path = directory / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


# A whole run


class Whole(NamedTuple):
    """A run to its end: the exit status, what it printed, and what remained."""

    status: int
    out: str
    err: str
    remained: list[str]


@pytest.fixture(scope="module")
def whole() -> Whole:
    with running() as process:
        status, out, err = finish(process)
    return Whole(status, out, err, remains(process.pid, out))


@pytest.mark.net
def test_the_demo_shows_each_step_and_every_check_holds(whole: Whole) -> None:
    status, out, err, remained = whole

    assert (status, err) == (0, "")
    assert "✗" not in out
    assert re.search(r"^All \d+ checks held, in ", out, re.MULTILINE)
    for line in SHOWN:
        pattern = re.sub(r"\b[CKS]\b", lambda match: ADDRESSES[match[0]], line)
        assert re.search(pattern, out), line
    assert remained == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "backend",
    [pytest.param("uml", marks=pytest.mark.vm), pytest.param("qemu", marks=pytest.mark.qemu)],
)
def test_between_virtual_machines_every_check_holds_too(backend: str) -> None:
    with running("--vm", backend) as process:
        status, out, err = finish(process, WITHIN_VM)

    assert (status, err) == (0, "")
    assert f"three hosts are there: {backend}" in out
    for line in SHOWN:
        pattern = re.sub(r"\b[CKS]\b", lambda match: ADDRESSES[match[0]], line)
        assert re.search(pattern, out), line
    assert remains(process.pid, out) == []


@pytest.mark.net
def test_piped_output_is_plain_and_at_most_100_columns_wide(whole: Whole) -> None:
    out = whole.out

    assert "\x1b" not in out
    assert [line for line in out.splitlines() if len(line.rstrip()) > 100] == []


@pytest.mark.net
def test_with_keep_it_relays_again_until_enter() -> None:
    with running("--keep") as process:
        out = read_until(process, " console --name")
        curl = re.search(r"# (.* exec --name krelay-[0-9a-f]{4} client curl .*)", out)
        assert curl
        asked = subprocess.run(
            [*shlex.split(curl[1]), "-sS"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=WITHIN,
        )
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        status, rest, err = finish(process)

    assert asked.stdout.startswith("The server sees you as 10.0.0.1:"), asked.stderr
    assert (status, err) == (0, "")
    assert remains(process.pid, out + rest) == []


# Leaving early


@pytest.mark.net
@pytest.mark.parametrize("moment", PROGRESS)
def test_ctrl_c_leaves_nothing_at_any_moment(moment: str) -> None:
    with running() as process:
        out = read_until(process, moment)
        process.send_signal(signal.SIGINT)
        status, rest, err = finish(process)

    assert (status, err) == (130, "krelay demo: interrupted; everything is removed\n")
    assert remains(process.pid, out + rest) == []


@pytest.mark.net
@pytest.mark.parametrize("moment", PROGRESS[1::2])
def test_sigterm_leaves_nothing_either(moment: str) -> None:
    with running() as process:
        out = read_until(process, moment)
        process.send_signal(signal.SIGTERM)
        status, rest, err = finish(process)

    assert (status, err) == (128 + signal.SIGTERM, "")
    assert remains(process.pid, out + rest) == []


@pytest.mark.net
def test_a_reader_that_goes_away_leaves_nothing() -> None:
    with running() as process:
        out = read_until(process, "relay: switched on")
        assert process.stdout is not None
        process.stdout.close()
        process.wait(WITHIN)

    assert remains(process.pid, out) == []


# When things go wrong


@pytest.mark.net
@pytest.mark.parametrize(
    ("name", "script", "says"),
    [
        (
            "dig",
            "echo 192.0.2.80",
            r"krelay demo: not so: .*DNS query.* not exactly one such row.*",
        ),
        ("curl", "echo hello", r"krelay demo: not so: .*HTTP connection.* not exactly one.*"),
        ("nft", "echo table ip left behind", r"krelay demo: .*no rule is left.*table ip left.*"),
        ("nginx", "echo no can do >&2; exit 3", r"krelay demo: nginx ended .*: no can do"),
        ("dnsmasq", "exit 3", r"krelay demo: dnsmasq ended .*: exit status 3"),
    ],
)
def test_a_program_that_does_something_else_fails_the_demo(
    name: str, script: str, says: str, tmp_path: Path
) -> None:
    if name == "nft":  # krelay needs it, too: only the listing is a lie
        script = f'[ "$*" = "list ruleset" ] && {script} || exec {shutil.which("nft")} "$@"'
    tool(tmp_path, name, script)

    with running(path=tmp_path) as process:
        status, out, err = finish(process)

    assert status == 1, out
    assert re.fullmatch(says + "\n", err), err
    assert remains(process.pid, out) == []


@pytest.mark.net
def test_a_wrong_answer_is_marked_where_it_was_claimed(tmp_path: Path) -> None:
    real = shutil.which("dig")
    tool(tmp_path, "dig", f'{real} "$@"; echo 192.0.2.81')

    with running(path=tmp_path) as process:
        status, out, err = finish(process)

    assert status == 1
    assert "✗ the DNS answer is the server's: 192.0.2.80\n    it printed " in out
    assert err.startswith("krelay demo: not so: the DNS answer is the server's")
    assert len(re.findall("✗", out)) == 1


@pytest.mark.net
def test_without_a_way_to_queue_packets_one_line_says_so(tmp_path: Path) -> None:
    for name in ("nft", "iptables-restore", "iptables-nft-restore", "iptables-legacy-restore"):
        tool(tmp_path, name, "echo 'Error: no queue in this kernel' >&2; exit 1")

    with running(path=tmp_path) as process:
        status, out, err = finish(process)

    assert status == 1
    assert re.fullmatch(r"krelay demo: relaying can't start: no way to queue packets: .*\n", err)
    assert remains(process.pid, out) == []


def test_without_root_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert play.run(argparse.Namespace(keep=False, vm=None)) == 1
    printed = capsys.readouterr()
    assert printed.err == "krelay demo: needs root (network namespaces); try: sudo krelay demo\n"
    assert printed.out == ""


def test_missing_programs_are_named_with_what_installs_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    tool(tmp_path, "nginx", "exit")
    tool(tmp_path, "curl", "exit")

    assert play.run(argparse.Namespace(keep=False, vm=None)) == 1
    assert capsys.readouterr().err == (
        "krelay demo: dnsmasq, dig, socat not installed; `make demo` installs what it needs\n"
    )


# The parts


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("nginx version: nginx/1.18.0 (Ubuntu)\n", (1, 18, 0)),
        ("nginx version: nginx/1.22.1", (1, 22, 1)),
        ("nginx: invalid option", (0,)),
    ],
)
def test_the_version_of_nginx_is_read(text: str, version: tuple[int, ...]) -> None:
    assert servers.nginx_version(text) == version


def test_nginx_writes_only_below_the_lab(tmp_path: Path) -> None:
    cast = Cast(client="10.0.0.1", relay="192.168.0.2", server="192.168.0.1", gport=16000)

    config = servers.nginx_config(tmp_path, cast, "root")

    paths = re.findall(r"(?:pid|error_log|access_log|\w+_temp_path) (\S+?)[ ;]", config)
    assert len(paths) == 8
    assert all(path.startswith(f"{tmp_path}/") for path in paths)
    assert "listen 192.168.0.1:80;" in config
