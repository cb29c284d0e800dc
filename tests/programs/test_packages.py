"""Setting up: what is missing is installed, unless something else would go for it."""

import subprocess
from collections.abc import Sequence

import pytest

from tests.programs import packages
from tests.programs.table import CLIENTS

REMOVES = "Inst chrony (4.3)\nRemv timesyncd [252]\nConf chrony (4.3)\n"


class Machine:
    """Answers for dpkg and apt-get: what is there, and what a simulation prints."""

    def __init__(self, there: Sequence[str], simulations: dict[str, str] | None = None) -> None:
        self.there = there
        self.simulations = simulations or {}
        self.installed: list[str] = []

    def run(self, command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        """In the place of subprocess.run."""
        out, err, status = "", "", 0
        if command[0] == "dpkg-query":
            out = "".join(f"installed {name} 1-1\n" for name in self.there)
        elif command[:3] == ("apt-get", "install", "-s"):
            out = self.simulations.get(command[-1], "")
            if command[-1] not in self.simulations:
                err, status = f"E: Unable to locate package {command[-1]}\n", 100
        elif "--install-as-root" in command:
            self.installed += command[command.index("--keep-off") + 2 :]
        return subprocess.CompletedProcess(tuple(command), status, out, err)


@pytest.fixture
def all_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the table needs of Debian; PyPI's are there."""
    monkeypatch.setattr(packages, "_set_up_python", lambda: None)
    monkeypatch.setattr(packages, "PYPI", {"aioquic": "1", "websockets": "1"})
    names = {name for client in CLIENTS for name in packages.needed(client)}
    return sorted(names)


def set_up(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> int:
    """On that machine."""
    monkeypatch.setattr(subprocess, "run", machine.run)
    return packages.set_up()


def test_nothing_is_run_where_nothing_is_missing(
    all_names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(all_names)

    assert set_up(machine, monkeypatch) == 0
    assert machine.installed == []


def test_what_has_others_removed_is_left_out_and_said(
    all_names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = [name for name in all_names if name not in ("chrony", "ncat")]
    machine = Machine(there, {"chrony": REMOVES, "ncat": "Inst ncat (7)\n"})

    assert set_up(machine, monkeypatch) == 1
    assert machine.installed == ["ncat"]
    assert "missing: chrony: install it yourself if timesyncd may go\n" in capsys.readouterr().out


def test_what_the_system_does_not_have_is_said(
    all_names: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = Machine([name for name in all_names if name != "hey"])

    assert set_up(machine, monkeypatch) == 1
    assert machine.installed == []
    assert "missing: hey: E: Unable to locate package hey\n" in capsys.readouterr().out


def test_what_is_half_installed_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        out = "installed curl 7.88\nconfig-files wget 1.21\nnot-installed hey \n"
        return subprocess.CompletedProcess((), 0, out, "")

    monkeypatch.setattr(subprocess, "run", run)

    assert packages.versions(["curl", "wget", "hey"]) == {"curl": "7.88"}
