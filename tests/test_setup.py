"""tools/setup: what it takes for a program that is there."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from krelay_vm import guest

ROOT = Path(__file__).parents[1]
SETUP = ROOT / "tools" / "setup"
IS_STATIC = (
    f"""eval "$(sed -n '/^is_static()/,/^}}/p' {shlex.quote(str(SETUP))})"; is_static "$1" """
)

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")


def is_static(program: Path) -> bool:
    """What the set-up thinks of a program."""
    command = ("bash", "-euo", "pipefail", "-c", IS_STATIC, "bash", str(program))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    return done.returncode == 0


@needs_gcc
@pytest.mark.parametrize(
    ("options", "static"),
    [((), False), (("-no-pie",), False), (("-static",), True), (("-static-pie",), True)],
)
def test_a_program_is_static_if_it_asks_for_no_loader(
    options: tuple[str, ...], static: bool, tmp_path: Path
) -> None:
    program = tmp_path / "program"
    subprocess.run(
        ("gcc", *options, "-x", "c", "-", "-o", program),
        input="int main(void) { return 0; }", text=True, check=True,
    )  # fmt: skip

    assert is_static(program) == static


def test_what_is_no_program_is_not_static(tmp_path: Path) -> None:
    script, cut = tmp_path / "script", tmp_path / "cut"
    script.write_text("#!/bin/sh\n")
    cut.write_bytes(Path(sys.executable).read_bytes()[:5] + bytes(59))  # no program headers
    for path in (script, cut):
        path.chmod(0o755)

    assert not is_static(script)
    assert not is_static(cut)
    assert not is_static(tmp_path / "nowhere")
    assert not is_static(tmp_path)


@pytest.mark.net
@pytest.mark.skipif(not os.path.exists(guest.BUSYBOX), reason=f"needs {guest.BUSYBOX}")
@pytest.mark.parametrize("group", ["test", "uml", "vm"])
def test_a_busybox_that_is_not_static_is_none(group: str, tmp_path: Path) -> None:
    # As who it takes for a user without sudo and Python: it says what it would install, and ends.
    programs = tmp_path / "bin"
    programs.mkdir()
    for folder in os.environ["PATH"].split(os.pathsep):
        for program in Path(folder).glob("*"):
            link = programs / program.name
            left_out = program.name in ("id", "sudo") or program.name.startswith("python")
            if not left_out and not link.is_symlink():
                link.symlink_to(program)
    (programs / "id").write_text("#!/bin/sh\necho 1000\n")
    (programs / "id").chmod(0o755)
    (tmp_path / "tools").mkdir()
    shutil.copy(SETUP, tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    script = f'mount --bind {shutil.which("ls")} {guest.BUSYBOX} && exec "$@"'
    done = subprocess.run(
        ("unshare", "-m", "sh", "-c", script, "sh", "bash", "tools/setup", "--group", group),
        cwd=tmp_path, env={"PATH": str(programs), "PYENV_ROOT": "/nowhere", "HOME": "/nowhere"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip

    assert done.returncode == 1
    assert "busybox-static" in done.stderr.split(), done.stderr
