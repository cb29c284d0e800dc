"""Which processes are ours, and for which tree, however they and it are written."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from krelay.host import processes
from krelay.host.processes import KRELAY, TCP_RELAY, RunningProgram, program, running, tree_of

RUN = Path("/run/krelay")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("/opt/krelay/bin/python3", "/opt/krelay/bin/tcp-relay", "--root", "x"), TCP_RELAY),
        (("python3", "-B", "-m", "tcp_relay", "--root", "x"), TCP_RELAY),
        (("python3.11", "-X", "dev", "-W", "error", "-B", "-O", "-m", "tcp_relay"), TCP_RELAY),
        (("python3", "-Bm", "tcp_relay"), TCP_RELAY),
        (("python3", "-mtcp_relay"), TCP_RELAY),
        (("python3", "-I", "/opt/krelay/isolated.py", "tcp_relay", "--root", "x"), TCP_RELAY),
        (("python3", "-IB", "/opt/krelay/isolated.py", "krelay", "daemon"), KRELAY),
        (("python3", "/src/tcp_relay/__main__.py"), TCP_RELAY),
        (("tcp-relay",), TCP_RELAY),
        (("/usr/local/bin/krelay", "up"), KRELAY),
        (("python3", "-c", "print()", "tcp-relay"), None),
        (("python3", "-m", "http.server", "tcp-relay"), None),
        (("sshd: /usr/sbin/sshd -D", ""), None),
        (("nginx: master process", "tcp-relay"), None),
        (("vim", "tcp-relay"), None),
        (("python3",), None),
        (("python3", "-m"), None),
        ((), None),
    ],
)
def test_a_program_of_ours_is_known_by_how_it_was_started(
    arguments: tuple[str, ...], name: str | None
) -> None:
    ours = program(arguments)
    assert (ours.name if ours else None) == name


@pytest.mark.parametrize(
    ("arguments", "tree"),
    [
        ((), None),
        (("--root", "a"), "a"),
        (("--root=a",), "a"),
        (("--roo", "a", "--workers", "2"), "a"),
        (("--r=a", "--root", "b"), "b"),
        (("--root",), None),
        (("--relay-gid", "5"), None),
    ],
)
def test_a_tree_is_read_as_argparse_reads_it(arguments: tuple[str, ...], tree: str | None) -> None:
    assert tree_of(arguments) == tree


def test_without_an_option_the_tree_is_the_environments_or_the_default() -> None:
    assert RunningProgram(1, ("tcp-relay",), "/").serves(RUN)
    assert not RunningProgram(1, ("tcp-relay",), "/", root="/run/other").serves(RUN)
    assert RunningProgram(1, ("tcp-relay",), "/", root="/run/krelay/").serves(RUN)
    assert not RunningProgram(1, ("tcp-relay", "--root", "/run/b"), "/", root="/run/krelay").serves(
        RUN
    )


def test_other_spellings_of_a_tree_are_the_same_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree, other = tmp_path / "run", tmp_path / "other"
    tree.mkdir()
    other.mkdir()
    (tmp_path / "link").symlink_to(tree)
    here = str(tmp_path)
    spellings = ("run", "./run", "run/", "other/../run", "link", str(tree), f"{here}/link/")
    monkeypatch.chdir(other)
    for spelling in spellings:
        process = RunningProgram(1, ("tcp-relay", "--root", spelling), here)
        for root in (tree, tmp_path / "link", Path("../run"), Path("../link")):
            assert process.serves(root), (spelling, root)
        assert not process.serves(other)


def test_a_relative_tree_counts_from_where_the_process_stands(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "run").mkdir(parents=True)
    process = RunningProgram(1, ("tcp-relay", "--root", "run"), str(tmp_path / "a"))

    assert process.serves(tmp_path / "a" / "run")
    assert not process.serves(tmp_path / "b" / "run")


def test_where_it_stands_is_unknown_it_may_be_ours() -> None:
    assert RunningProgram(1, ("tcp-relay", "--root", "run")).serves(RUN)
    assert not RunningProgram(1, ("nginx", "--root", "run")).serves(RUN)


@pytest.fixture
def child(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that only looks like a tcp-relay for `run`."""
    script = tmp_path / "tcp-relay"
    script.write_text("import time\ntime.sleep(60)\n")
    with subprocess.Popen(
        (sys.executable, str(script), "--root", "run"),
        cwd=tmp_path,
        env={"KRELAY_ROOT": "/run/elsewhere"},
    ) as process:
        yield process
        process.kill()


def test_what_runs_is_found_with_its_folder_and_environment(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    deadline = time.monotonic() + 30
    while not (found := list(running(tmp_path / "run"))) and time.monotonic() < deadline:
        time.sleep(0.01)

    assert [(each.name, each.arguments) for each in found] == [(TCP_RELAY, ("--root", "run"))]
    assert list(running(tmp_path / "other")) == []
    seen = processes.look(child.pid)
    assert seen is not None
    assert (seen.folder, seen.root) == (str(tmp_path), "/run/elsewhere")


def test_what_is_gone_or_a_kernels_thread_is_not_looked_at() -> None:
    assert processes.look(1 << 30) is None
    assert processes.look(os.getpid()) is not None
