"""python -m krelay_vm, as a person types it."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.utils import PcapNgReader

from krelay_vm import Lab, netns, registry
from krelay_vm.__main__ import main
from krelay_vm.build import leftovers
from tests.vm.test_lab import until

ROOT = Path(__file__).parents[2]


def vm(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `python -m krelay_vm` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "krelay_vm", *arguments],
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


@pytest.mark.parametrize(
    "command", [(), *((name,) for name in ("up", "exec", "console", "capture", "list", "down"))]
)
def test_every_help_shows_an_example(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])

    assert ended.value.code == 0
    assert "example: python -m krelay_vm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["sideways"],
        ["exec"],
        ["exec", "client"],
        ["down", "--all", "--stale"],
        ["up", "--client"],
        ["up", "--client", "vax"],
        ["up", "--nobody", "uml"],
        ["up", "--host", "client"],
        ["list", "--client", "uml"],
    ],
)
def test_wrong_usage_ends_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: object = main(arguments)
    except SystemExit as end:
        status = end.code

    assert status == 2
    assert "usage: python -m krelay_vm" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("lst", "no command 'lst'; did you mean list?"),
        ("down --stael", "unknown: --stael; did you mean --stale?"),
    ],
)
def test_a_wrong_word_is_told_what_was_probably_meant(
    typed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed.split())

    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {said}\n")


def test_without_root_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)

    assert main(["up"]) == 1
    assert capsys.readouterr().err == (
        "python -m krelay_vm: needs root (network namespaces); try with sudo\n"
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
    assert name not in leftovers()

    command = ("exec", "--name", name, "server")
    assert "192.168.0.1/24" in vm(*command, "ip", "addr").stdout
    assert vm(*command, "cat", stdin="passed on").stdout == "passed on"
    assert vm(*command, "sh", "-c", "exit 7").returncode == 7

    again = vm("up", "--name", name)
    assert (again.returncode, again.stdout) == (1, "")
    assert (
        again.stderr
        == f"python -m krelay_vm: there is a lab {name} already, or something else of that name\n"
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
        [sys.executable, "-m", "krelay_vm", *command], stdout=subprocess.PIPE, text=True, cwd=ROOT
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
    assert done.stderr.startswith("python -m krelay_vm: ")
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
    script = (
        "from krelay_vm import Lab; lab = Lab().__enter__(); print(lab.name, flush=True); input()"
    )
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


@pytest.mark.net
def test_a_capture_at_a_link_is_a_file_for_wireshark(name: str, tmp_path: Path) -> None:
    vm("up", "--name", name)
    file = tmp_path / "link.pcapng"
    send = "import socket; socket.socket(type=2).sendto(b'ping from here', ('10.0.0.254', 9))"
    with subprocess.Popen(
        [sys.executable, "-m", "krelay_vm", "capture", "--name", name, "client-relay", str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as capturing:
        assert capturing.stderr is not None
        assert capturing.stderr.readline() == "capturing at client eth0; Ctrl-C ends it\n"
        vm("exec", "--name", name, "client", "python3", "-c", send)
        until(lambda: b"ping from here" in file.read_bytes())
        capturing.send_signal(signal.SIGINT)
        said, _ = capturing.communicate(timeout=10)

    with PcapNgReader(str(file)) as reader:
        frames = [(packet.direction, bytes(packet)) for packet in reader]
    assert said == f"{len(frames)} frames in {file}\n"
    assert capturing.returncode == 0
    # The answer, that nobody listens there, quotes it.
    assert [direction for direction, data in frames if b"ping from here" in data] == [2, 1]
    wrong = vm("capture", "--name", name, "client-server", str(file))
    assert "has no link 'client-server'; there are client-relay" in wrong.stderr


@pytest.mark.net
def test_a_console_of_a_namespace_is_a_shell_in_it(name: str) -> None:
    vm("up", "--name", name)

    assert "192.168.0.2/24" in vm("console", "--name", name, "relay", stdin="ip addr\n").stdout


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param("uml", marks=pytest.mark.vm),
        pytest.param("qemu", marks=[pytest.mark.qemu, pytest.mark.slow]),
    ],
)
def test_machines_stay_from_up_to_down(name: str, backend: str) -> None:
    assert vm("up", "--name", name, "--client", backend).returncode == 0
    assert f"{name}  stays  client ({backend}) relay server\n" in vm("list").stdout

    command = ("exec", "--name", name, "client")
    assert vm(*command, "hostname").stdout == "client\n"
    assert vm(*command, "cat", stdin="passed on").stdout == "passed on"
    failed = vm(*command, "sh", "-c", "echo oops >&2; exit 7")
    assert (failed.returncode, failed.stderr) == (7, "oops\n")
    with subprocess.Popen(
        [sys.executable, "-m", "krelay_vm", "console", "--name", name, "client"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
    ) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        shell.stdin.write(b"echo $((6 * 7))\n")
        shell.stdin.flush()
        shown = b""
        while b"42\r\n" not in shown:
            shown += os.read(shell.stdout.fileno(), 4096)
        shell.stdin.write(b"\x1d")
        shell.stdin.close()
        assert shell.wait(10) == 0

    assert vm("down", "--name", name).stdout == f"lab {name} removed\n"
