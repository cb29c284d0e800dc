"""Which kernels there are for machines, and what is said, once and clearly, where there is none."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from krelay_vm import LabError, guest, kernels
from tests.conftest import why_no_net, why_no_qemu, why_no_vm

ROOT = Path(__file__).parents[2]
TUN = "/dev/net/tun is not there or not ours to open: its network interfaces can't be made"
AFTER = "; run: make vm-setup"
NO_UML = f"User-Mode Linux (linux.uml) is not installed{AFTER}"
NO_QEMU = f"QEMU (qemu-system-x86_64) is not installed{AFTER}"


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has all that is needed, as far as `kernels` looks; its root."""
    for folder in ("bin", "modules/6.1", "cache/krelay-vm/linux-image-6.1"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("linux.uml", "qemu-system-x86_64", "busybox", "tun"):
        shutil.copy("/bin/busybox", tmp_path / "bin" / name)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(kernels, "TUN", tmp_path / "bin" / "tun")
    monkeypatch.setattr(kernels, "UML_MODULES", tmp_path / "modules")
    monkeypatch.setattr(guest, "BUSYBOX", str(tmp_path / "bin" / "busybox"))
    return tmp_path


def without(name: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def dynamic_busybox(root: Path) -> None:
    # Whether a program is static is known of its path from then on: another path.
    other = root / "bin" / "dynamic"
    shutil.copy(sys.executable, other)
    guest.BUSYBOX = str(other)  # the fixture undoes it


@pytest.mark.skipif(not os.access("/bin/busybox", os.X_OK), reason="needs /bin/busybox")
class TestReasons:
    def test_there_is_none_where_everything_is(self, everything: Path) -> None:
        assert [kernels.why_not(backend) for backend in ("netns", "uml", "qemu")] == [None] * 3

    @pytest.mark.parametrize(
        ("change", "uml", "qemu"),
        [
            (without("bin/linux.uml"), NO_UML, None),
            (without("bin/qemu-system-x86_64"), None, NO_QEMU),
            (without("bin/busybox"), "no {root}/bin/busybox" + AFTER,
             "no statically linked {root}/bin/busybox" + AFTER),
            (without("modules/6.1"), "no kernel modules in {root}/modules" + AFTER, None),
            (without("cache/krelay-vm"), None, "no kernel in {root}/cache/krelay-vm" + AFTER),
            (dynamic_busybox, None, "no statically linked {root}/bin/dynamic" + AFTER),
        ],
    )  # fmt: skip
    def test_what_is_missing_is_named(
        self,
        everything: Path,
        change: Callable[[Path], object],
        uml: str | None,
        qemu: str | None,
    ) -> None:
        kernels._is_static.cache_clear()
        change(everything)
        wanted = [text and text.format(root=everything) for text in (uml, qemu)]
        assert [kernels.why_not(backend) for backend in ("uml", "qemu")] == wanted
        for backend, reason in zip(("uml", "qemu"), wanted, strict=True):
            if reason:
                with pytest.raises(LabError, match=r"^backend "):
                    kernels.kernel(backend)

    def test_without_a_tun_device_nobody_has_a_network(
        self, everything: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (everything / "bin" / "tun").unlink()
        for backend in ("uml", "qemu"):
            reason = kernels.why_not(backend)
            assert reason
            assert reason.endswith("is not there or not ours to open: " + TUN.partition(": ")[2])

    def test_without_root_that_comes_first(
        self, everything: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        (everything / "bin" / "linux.uml").unlink()
        assert [kernels.why_not(b) for b in ("netns", "uml", "qemu")] == [
            None,
            "needs root",
            "needs root",
        ]


# The tests themselves, on a machine that lacks something

MACHINES = ("-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-m", "vm or qemu")
ALL = "tests/vm/test_crossing.py"


def run(prefix: tuple[str, ...], *argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        (*prefix, sys.executable, "-B", *argv),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )


def hiding(*paths: str) -> tuple[str, ...]:
    """What puts an empty file system over folders, for one program."""
    mounts = " && ".join(f"mount -t tmpfs none {path}" for path in paths)
    return ("unshare", "-m", "sh", "-c", f'{mounts} && exec "$@"', "sh")


@pytest.mark.vm
@pytest.mark.slow
def test_without_tun_tests_are_skipped_with_that_reason_and_commands_say_it() -> None:
    no_tun = hiding("/dev/net")
    tests = run(no_tun, *MACHINES, ALL)
    assert tests.returncode == 0, tests.stdout
    assert "7 skipped" in tests.stdout.splitlines()[-1]
    assert "passed" not in tests.stdout
    assert tests.stdout.count(TUN) >= 1
    for command in (
        ("-m", "krelay_vm", "up", "--backend", "uml"),
        ("-m", "krelay", "demo", "--vm", "uml"),
    ):
        said = run(no_tun, *command)
        assert said.returncode == 1
        assert said.stderr.splitlines() == [said.stderr.strip()]
        assert f"backend uml: {TUN}" in said.stderr


@pytest.mark.vm
@pytest.mark.slow
def test_without_the_programs_tests_are_skipped_with_that_reason(tmp_path: Path) -> None:
    here = {**os.environ, "PATH": str(tmp_path)}
    for folder in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(folder).glob("*"):
            link = tmp_path / program.name
            if not program.name.startswith(("linux.uml", "qemu-system")) and not link.is_symlink():
                link.symlink_to(program)
    tests = subprocess.run(
        (sys.executable, "-B", *MACHINES, ALL),
        cwd=ROOT, env=here, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert tests.returncode == 0, tests.stdout
    assert "7 skipped" in tests.stdout.splitlines()[-1]
    assert NO_UML in tests.stdout
    assert NO_QEMU in tests.stdout


def test_the_reasons_that_skip_tests_are_lines() -> None:
    for reason in (why_no_net(), why_no_vm(), why_no_qemu()):
        assert reason is None or (reason and "\n" not in reason)
