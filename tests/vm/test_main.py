"""python -m vm, as a person types it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from vm import Lab, netns, registry
from vm.__main__ import main

ROOT = Path(__file__).parents[2]


def vm(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `python -m vm` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "vm", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=30,
    )


@pytest.fixture
def name() -> Iterator[str]:
    """A lab's name, taken by no other; the lab is removed after the test."""
    name = f"krelay-t{os.getpid()}"
    yield name
    vm("down", "--name", name)
    assert [entry for entry in os.listdir(netns.RUN) if entry.startswith(name)] == []


@pytest.mark.parametrize("command", [(), ("up",), ("exec",), ("list",), ("down",)])
def test_every_help_shows_an_example(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])

    assert ended.value.code == 0
    assert "example: python -m vm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["sideways"], ["exec"], ["exec", "client"], ["down", "--all", "--stale"]]
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    assert "usage: python -m vm" in capsys.readouterr().err


def test_without_root_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert main(["up"]) == 1
    assert capsys.readouterr().err == (
        "python -m vm: needs root (network namespaces); try with sudo\n"
    )


@pytest.mark.net
def test_a_lab_stays_from_up_to_down(name: str) -> None:
    up = vm("up", "--name", name)
    assert up.returncode == 0
    assert "client 10.0.0.1 ---- 10.0.0.254 relay 192.168.0.2 ---- 192.168.0.1 server" in up.stdout
    assert f"lab {name} is up" in up.stdout

    assert f"{name}  stays  client relay server\n" in vm("list").stdout
    shown = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert f"{name}-relay" in shown
    assert name not in Lab.leftovers()

    command = ("exec", "--name", name, "server")
    assert "192.168.0.1/24" in vm(*command, "ip", "addr").stdout
    assert vm(*command, "cat", stdin="passed on").stdout == "passed on"
    assert vm(*command, "sh", "-c", "exit 7").returncode == 7

    again = vm("up", "--name", name)
    assert (again.returncode, again.stdout) == (1, "")
    assert (
        again.stderr
        == f"python -m vm: there is a lab {name} already, or something else of that name\n"
    )

    down = vm("down", "--name", name)
    assert (down.returncode, down.stdout) == (0, f"lab {name} removed\n")
    assert name not in vm("list").stdout
    assert vm("down", "--name", name).returncode == 1


@pytest.mark.net
def test_down_ends_what_runs_in_the_lab(name: str) -> None:
    vm("up", "--name", name)
    command = ["exec", "--name", name, "client", "sh", "-c", "echo in; sleep 60"]
    with subprocess.Popen(
        [sys.executable, "-m", "vm", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as inside:
        assert inside.stdout is not None
        assert inside.stdout.readline() == "in\n"
        assert vm("down", "--name", name).returncode == 0

        assert inside.wait(10) == -9


@pytest.mark.net
def test_a_topology_can_come_from_a_file(name: str, tmp_path: Path) -> None:
    file = tmp_path / "two.toml"
    file.write_text(
        "[hosts]\na = {}\nb = {}\n[[links]]\nsubnet = '10.7.0.0/24'\nmembers = ['a .1', 'b .2']\n"
    )

    assert (
        "10.7.0.0/24\n  a  eth0  10.7.0.1\n"
        in vm("up", "--name", name, "--topology", str(file)).stdout
    )
    assert "10.7.0.2/24" in vm("exec", "--name", name, "b", "ip", "addr").stdout


@pytest.mark.net
@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("up", "--name", "No"), "'No' is not a lab's name: a-z"),
        (("up", "--topology", "/nowhere"), "No such file or directory: '/nowhere'"),
        (("up", "--topology", "/dev/null"), "/dev/null: a topology file has a table [hosts]"),
        (("exec", "--name", "nosuchlab", "client", "true"), "there is no lab nosuchlab"),
        (("down", "--name", "nosuchlab"), "there is no lab nosuchlab"),
    ],
)
def test_what_fails_is_told_in_one_line(arguments: tuple[str, ...], complaint: str) -> None:
    done = vm(*arguments)

    assert done.returncode == 1
    assert done.stderr.startswith("python -m vm: ")
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.net
def test_a_host_that_is_not_there_is_told_with_those_that_are(name: str) -> None:
    vm("up", "--name", name)
    done = vm("exec", "--name", name, "nobody", "true")

    assert done.returncode == 1
    assert f"lab {name} has no host 'nobody'; there are client, relay, server" in done.stderr


@pytest.mark.net
def test_a_lab_that_is_in_use_is_not_taken_down() -> None:
    with Lab() as lab:
        for choice in (("--name", lab.name), ("--stale",)):
            done = vm("down", *choice)
            assert lab.name not in done.stdout
        assert (
            f"lab {lab.name} belongs to process {os.getpid()}"
            in vm("down", "--name", lab.name).stderr
        )
        assert f"{lab.name}  belongs to process {os.getpid()}  client" in vm("list").stdout
        lab.run("client", "true")


@pytest.mark.net
def test_down_stale_removes_what_a_killed_process_left() -> None:
    script = "from vm import Lab; lab = Lab().__enter__(); print(lab.name, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as owner:
        assert owner.stdout is not None
        left = owner.stdout.readline().strip()
        owner.kill()

    assert f"{left}  left by process {owner.pid}  client relay server\n" in vm("list").stdout
    assert f"lab {left} removed\n" in vm("down", "--stale").stdout
    assert left not in [record.name for record in registry.records()]
    assert not [entry for entry in os.listdir(netns.RUN) if entry.startswith(left)]
