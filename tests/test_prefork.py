"""A program that is forked (tests/tools/prefork.py) is the same as one that is executed."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from knet.children import compiled_as_here
from krelay_vm import Host, Lab, Program, Topology, program
from tests.net.world import World, answers
from tests.tools import prefork

pytestmark = pytest.mark.net

PYTHON = (sys.executable, *compiled_as_here(), "-m")
INHERITED = "tests.tools.inherited"


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    monkeypatch.setattr(program, "POPEN", prefork.Popen)
    monkeypatch.setitem(prefork.LOADED, INHERITED, ("json",))
    with Lab(Topology(hosts=(Host("one"),), links=())) as lab:
        yield lab
    if server := prefork.Popen.servers.pop(INHERITED, None):
        server.close()


def forked(started: Program) -> bool:
    """By its parent, which isn't this process."""
    status = Path(f"/proc/{started.pid}/status").read_text()
    return f"PPid:\t{os.getpid()}\n" not in status


def serves(lab: Lab, *python: str, env: Mapping[str, str] | None = None) -> Program:
    """krelay, which can be asked."""
    root = lab.directory / "run"
    started = lab.start("one", *python, "krelay", "daemon", "--root", str(root), env=env)
    lab.wait(lambda: started.poll() is not None or answers(root), "krelay")
    assert started.poll() is None, started.output
    return started


def inherits(lab: Lab, file: Path) -> dict[str, Any]:
    result = lab.run("one", *PYTHON, INHERITED, str(file), "a b", env={"OURS": "1"})
    assert (result.stdout, result.stderr) == ("", "")
    found: dict[str, Any] = json.loads(file.read_text())
    found["arguments"].remove(str(file))
    return found


def test_it_has_what_it_would_have(
    lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
    umask = os.umask(0o027)
    try:
        by_fork = inherits(lab, tmp_path / "forked")
        monkeypatch.setattr(program, "POPEN", subprocess.Popen)
        by_exec = inherits(lab, tmp_path / "executed")
    finally:
        os.umask(umask)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for each in (by_fork, by_exec):
        each["environment"].pop("_", None)  # a shell's, which was only on the way
        each["environment"].pop("OLDPWD", None)
        each["files"] = {
            name: place if place.startswith("/") else place.partition(":")[0]
            for name, place in each["files"].items()
        }

    assert by_fork == by_exec


@pytest.mark.parametrize("by_fork", [True, False])
def test_how_it_ends_is_told(lab: Lab, by_fork: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not by_fork:
        monkeypatch.setattr(program, "POPEN", subprocess.Popen)
    for number, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        started = serves(lab, *PYTHON)
        assert forked(started) == by_fork
        started.signal(number)
        assert started.wait() == status
    wrong = lab.run("one", *PYTHON, "krelay", "nonsense", check=False)
    assert (wrong.status, wrong.stdout) == (2, "")
    assert "krelay: error:" in wrong.stderr
    assert lab.run("one", *PYTHON, "krelay", "--version").stdout.startswith("krelay ")


def test_what_needs_a_python_of_its_own_gets_it(lab: Lab) -> None:
    within: tuple[tuple[tuple[str, ...], dict[str, str]], ...] = (
        (("sh", "-c", 'exec "$0" "$@"', *PYTHON), {}),
        (PYTHON, {"PYTHONUTF8": "1"}),
    )
    for words, env in within:
        started = serves(lab, *words, env=env)
        assert not forked(started)
        started.kill()
        started.wait()


def test_what_labs_start_most_often_is_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "POPEN", prefork.Popen)
    with World() as world:
        assert forked(world.serve("server", "tcp/80", "udp/7"))
        world.begin()
        assert forked(world.krelay_process)
        assert forked(world.tcp_relay_process)
        assert world.who("client", 80).startswith(f"{world.client}:")


def test_it_ends_with_the_process_that_forked_it(lab: Lab) -> None:
    started = serves(lab, *PYTHON)
    prefork.Popen.servers.pop("krelay").close()

    assert started.wait() == -signal.SIGKILL
