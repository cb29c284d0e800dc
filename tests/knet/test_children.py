"""What the programs that krelay starts inherit from whoever started krelay: next to nothing."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from knet import children
from tests.tcp_relay.helpers import BOUND, wait_for

HERE = Path(__file__).parents[2]
OTHER = 65534
PLANTED = ("krelay", "tcp_relay", "procfs_sim", "rich", "sitecustomize", "usercustomize", "runpy")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user can be made by root alone")


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A folder full of modules that tell when they are loaded, by a file `sprung`."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in PLANTED:
        code = f"open({str(folder / 'sprung')!r}, 'a').write({name!r} + ' ')\n"
        (folder / f"{name}.py").write_text(code)
    return folder


@pytest.fixture
def inherited(tmp_path: Path) -> Iterator[Any]:
    """Starts a child; what it has inherited."""
    running: list[subprocess.Popen[bytes]] = []

    def start() -> dict[str, Any]:
        file = tmp_path / f"inherited-{len(running)}"
        running.append(children.start("tests.tools.inherited", str(file)))
        wait_for(file.exists, "the child's notes")
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    yield start
    for process in running:
        assert process.wait(BOUND) == 0


@contextmanager
def standing_in(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@pytest.mark.parametrize("module", ["krelay", "tcp_relay", "procfs_sim", "tcp_relay.tcpproxy"])
@pytest.mark.parametrize("lead", ["folder", "PYTHONPATH", "PYTHONHOME", "PYTHONSTARTUP"])
def test_modules_are_never_the_callers(trap: Path, module: str, lead: str) -> None:
    env = dict(os.environ)
    if lead != "folder":
        env[lead] = {"PYTHONSTARTUP": str(trap / "rich.py")}.get(lead, f":{trap}")
    command = children.python(module, "--help")
    done = subprocess.run(command, cwd=trap, env=env, capture_output=True, text=True, timeout=20)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")
    assert not (trap / "sprung").exists()


def test_a_trap_springs_where_modules_come_from_the_folder(trap: Path) -> None:
    """The way it was done before."""
    done = subprocess.run((sys.executable, "-m", "krelay", "--help"), cwd=trap, timeout=20)

    assert done.returncode == 0
    assert "krelay" in (trap / "sprung").read_text()


def test_a_checkout_that_is_not_installed_runs_its_own_modules(tmp_path: Path) -> None:
    for package in ("knet", "krelay"):
        (tmp_path / package).mkdir()
    for name in ("knet/__init__.py", "knet/isolated.py", "krelay/__init__.py"):
        (tmp_path / name).write_text((HERE / name).read_text())
    (tmp_path / "krelay" / "__main__.py").write_text("print('mine', __file__)")
    script = str(tmp_path / "knet" / "isolated.py")
    command = (sys.executable, "-IS", script, "krelay")
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=20)

    assert done.stdout == f"mine {tmp_path}/krelay/__main__.py\n"


def test_a_child_keeps_compiled_modules_where_its_parent_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child() -> list[str]:
        code = "import sys; print(sys.pycache_prefix, sys.dont_write_bytecode)"
        command = (sys.executable, "-I", "-S", *children.compiled_as_here(), "-c", code)
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.split()

    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    mine.mkdir(0o755)
    theirs.mkdir()
    theirs.chmod(0o777)
    for folder, writes_not, found in (
        (None, False, ["None", "False"]),
        (str(mine), False, [str(mine), "False"]),
        (str(mine), True, ["None", "True"]),
        (str(theirs), False, ["None", "True"]),  # what others have put there isn't run
        (str(tmp_path / "nowhere"), False, ["None", "True"]),
    ):
        monkeypatch.setattr(sys, "pycache_prefix", folder)
        monkeypatch.setattr(sys, "dont_write_bytecode", writes_not)
        assert child() == found


def test_the_environment_is_made_from_a_list() -> None:
    given = {
        "PATH": "/usr/bin:.::bin:/no/such/folder",
        "LANG": "C.UTF-8",
        "LC_ALL": "C",
        "KRELAY_ROOT": "/run/other",
        "NOTIFY_SOCKET": "/run/notify",
        **dict.fromkeys(("PYTHONPATH", "PYTHONSTARTUP", "LD_PRELOAD", "LD_LIBRARY_PATH"), "x"),
        **dict.fromkeys(("HOME", "XDG_CONFIG_HOME", "BASH_ENV", "XTABLES_LIBDIR", "IFS"), "x"),
    }
    kept = {name: given[name] for name in ("LANG", "LC_ALL", "KRELAY_ROOT", "NOTIFY_SOCKET")}
    assert children.environment(given) == {"PATH": "/usr/bin", **kept}
    assert children.environment({}) == {"PATH": children.trusted_path(children.FOLDERS)}


@needs_root
def test_programs_are_looked_for_only_where_others_can_not_put_them(tmp_path: Path) -> None:
    def made(name: str, mode: int = 0o755, owner: int = 0) -> str:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        os.chown(folder, owner, owner)
        folder.chmod(mode)
        return str(folder)

    good, theirs, group, sticky = (
        made("good"),
        made("theirs", owner=OTHER),
        made("group", 0o775),
        made("sticky", 0o1777),
    )
    below_theirs, in_sticky = made("theirs/below"), made("sticky/below")
    link = tmp_path / "link"
    link.symlink_to(theirs)
    found = [good, theirs, group, sticky, below_theirs, in_sticky, str(link), "good", "", "."]
    assert [folder for folder in found if children.is_trusted(folder)] == [good, in_sticky]
    assert children.trusted_path(":".join(found)) == f"{good}:{in_sticky}"
    assert [children.trusted_path(path) for path in ("", ".", ":", theirs)] == ["/nonexistent"] * 4


def test_a_child_inherits_no_file_mask_signal_or_folder(inherited: Any, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    signals = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGCHLD)}
    umask, mask = os.umask(0), signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        for number in signals:
            signal.signal(number, signal.SIG_IGN)
        with standing_in(tmp_path):
            found = inherited()
    finally:
        os.umask(umask)
        for number, handler in signals.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(reader)
        os.close(writer)

    assert found["umask"] == children.UMASK
    assert int(found["blocked"], 16) == 0
    python_own = {signal.SIGPIPE, signal.SIGXFSZ}  # what Python itself ignores
    ignored = {n for n in signal.valid_signals() if int(found["ignored"], 16) >> (n - 1) & 1}
    assert ignored <= python_own
    assert set(found["files"]) - {"0", "1", "2"} <= {"3"}  # that of looking
    assert found["files"]["0"] == "/dev/null"
    assert (found["session"], found["folder"]) == (True, "/")


def test_a_child_inherits_of_the_environment_what_is_listed(
    inherited: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTHONPATH", "LD_LIBRARY_PATH", "HOME", "XDG_CONFIG_HOME", "ENV"):
        monkeypatch.setenv(name, "/nowhere")
    monkeypatch.setenv("KRELAY_ROOT", "/run/other")
    found = inherited()

    assert set(found["environment"]) <= {"PATH", "LC_CTYPE", *children.KEPT, "LC_ALL"}
    assert found["environment"]["KRELAY_ROOT"] == "/run/other"
    assert "/nowhere" not in found["path"]


@needs_root
def test_a_child_of_root_has_none_of_roots_groups(inherited: Any) -> None:
    before = os.getgroups()
    os.setgroups((0, 4, 27))
    try:
        found = inherited()
    finally:
        os.setgroups(before)
    assert found["groups"] == []


LEAVES = """
import json, os, signal, sys
from knet import isolated
isolated.leave_callers_folder()
from knet import children
children.prepare()
import rich
print(json.dumps([sys.path, os.environ["PATH"], sorted(os.environ),
                  signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL]))
"""


@pytest.mark.parametrize("lead", ["", ":"])
def test_a_command_leaves_the_folder_in_which_it_was_started(trap: Path, lead: str) -> None:
    for name in PLANTED:  # what is loaded before our first line is Python's affair
        if name != "rich":
            (trap / f"{name}.py").unlink()
    env = {
        "PATH": ".:bin::/usr/bin",
        "PYTHONPATH": f"{lead}{HERE}",
        "XTABLES_LIBDIR": ".",
        "BASH_ENV": "./rc",
    }
    python = (sys.executable, *children.compiled_as_here(), "-c", LEAVES)
    shell = f"trap '' CHLD; exec {shlex.join(python)}"
    done = subprocess.run(
        ("sh", "-c", shell), cwd=trap, env=env, capture_output=True, text=True, timeout=20
    )
    path, programs, names, hears_of_children = json.loads(done.stdout)
    assert not {"", str(trap)} & set(path)
    assert programs == "/usr/bin"
    assert not [name for name in names if name.startswith(children.LOADERS)]
    assert hears_of_children
    assert not (trap / "sprung").exists()
