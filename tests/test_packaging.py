"""The wheel: what it puts into site-packages, what it says of itself, and that it works there.

It is built without a network, from a copy of the tree, so that nothing is left in it.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_string
from email.message import Message
from importlib.metadata import version
from pathlib import Path

import pytest

from knet.version import VERSION

ROOT = Path(__file__).parents[1]
OTHERS = ("knet", "krelay", "procfs_sim", "tcp_relay", "usertcp", "tcpcap", "fourover6")
"""Names in site-packages that don't begin with krelay_."""
LEFT_OUT = (".*", "__pycache__", "build", "*.egg-info", "tests", "docs", "findings", "benchmarks")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        int(version("setuptools").partition(".")[0]) < 77,
        reason="needs setuptools 77, which tools/setup installs",
    ),
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built."""
    tree, to = tmp_path_factory.mktemp("tree") / "krelay", tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    _pip("wheel", "--no-build-isolation", "--wheel-dir", str(to), str(tree))
    (built,) = to.iterdir()
    return built


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    """The files in it."""
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    """What it says of itself."""
    return message_from_string(_read(wheel, "METADATA"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel , and what it needs from here."""
    place = _environment(tmp_path_factory.mktemp("fresh"))
    _pip("--python", str(place / "bin" / "python"), "install", str(wheel))
    return place


def _environment(place: Path) -> Path:
    """A virtual environment where nothing of krelay's is, with what it needs from this one."""
    subprocess.run((sys.executable, "-m", "venv", "--without-pip", str(place)), check=True)
    # A line of a .pth is a folder, whose own .pth files aren't read: this checkout stays out.
    needed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (_site(place) / "needed.pth").write_text("\n".join(needed) + "\n")
    return place


def _pip(*arguments: str) -> None:
    command = (sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments)
    done = subprocess.run(
        (*command, "--no-deps", "--no-index"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def _read(wheel: Path, name: str) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (each for each in archive.namelist() if each.endswith(f".dist-info/{name}"))
        return archive.read(path).decode()


def _packages() -> list[str]:
    """The folders of the repository that are packages of ours, by the names of the wheel."""
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    return sorted(folders - {"vm", "tests", "tools", "benchmarks"})


def test_its_names_are_no_others(names: list[str]) -> None:
    top = {name.partition("/")[0] for name in names}
    ours = {name for name in top if not name.endswith(".dist-info")}

    assert ours == set(_packages())
    assert "krelay_vm" in ours
    assert all(name in OTHERS or name.startswith("krelay_") for name in ours)


def test_nothing_is_missing_from_it(names: list[str]) -> None:
    wanted = {
        str(path.relative_to(ROOT))
        for package in _packages()
        for path in (ROOT / package).resolve().rglob("*.py")
        for path in [ROOT / package / path.relative_to((ROOT / package).resolve())]
    }

    assert wanted <= set(names)
    assert "krelay_vm/xstate.c" in names
    for program in (ROOT / "krelay" / "offload" / "programs").glob("*.c"):
        assert {
            f"krelay/offload/{program.stem}.o", f"krelay/offload/programs/{program.name}"
        } <= set(names)  # fmt: skip
    assert {f"{package}/py.typed" for package in _packages()} <= set(names)
    unwanted = [n for n in names if n.startswith("tests") or n.endswith((".pyc", ".so"))]
    assert not unwanted


def test_its_commands_are_those_of_the_contract(wheel: Path) -> None:
    assert _read(wheel, "entry_points.txt").split("\n")[:4] == [
        "[console_scripts]",
        "krelay = krelay.__main__:main",
        "tcp-relay = tcp_relay.__main__:main",
        "tcpproxy = tcp_relay.tcpproxy:main",
    ]


def test_it_says_what_it_is(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("krelay", VERSION)
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert str(metadata.get_payload()).strip() == (ROOT / "README.md").read_text().strip()
    assert metadata["Keywords"]
    kinds = {line.partition(" :: ")[0] for line in metadata.get_all("Classifier", [])}
    assert kinds >= {"Development Status", "Operating System", "Programming Language", "Typing"}
    # None that doesn't exist: a page of the project's may be added here once there is one.
    assert metadata.get_all("Project-URL", []) == []


def test_what_only_tests_and_benchmarks_need_is_an_extra(metadata: Message) -> None:
    by_extra: dict[str, set[str]] = {"": set(), "bench": set(), "docs": set(), "dev": set()}
    for line in metadata.get_all("Requires-Dist", []):
        name = re.split(r"[^\w-]", line.lower().replace("_", "-"), maxsplit=1)[0]
        by_extra[line.partition('extra == "')[2].rstrip('"')].add(name)

    assert by_extra[""] == {"netfilterqueue", "pyroute2", "rich", "inotify-simple"}
    assert "scapy" in by_extra["bench"] & by_extra["dev"]


@pytest.mark.parametrize("program", ["krelay", "tcp-relay", "tcpproxy"])
def test_its_commands_run_in_a_fresh_environment(
    installed: Path, program: str, tmp_path: Path
) -> None:
    done = _run(installed / "bin" / program, "--version", cwd=tmp_path)

    assert done.stdout == f"{program} {VERSION}\n"


def test_its_machines_are_krelay_vm(installed: Path, tmp_path: Path) -> None:
    python = installed / "bin" / "python"

    assert "python -m krelay_vm" in _run(python, "-m", "krelay_vm", "--help", cwd=tmp_path).stdout
    text = "import krelay_vm.machine as m, krelay.demo.play, sys"
    text += "; print(m.__file__, 'vm' in sys.modules)"
    path, other = _run(python, "-c", text, cwd=tmp_path).stdout.split()
    assert path == str(_site(installed) / "krelay_vm" / "machine.py")
    assert other == "False"


@pytest.mark.parametrize("way", ["from its folder", "by its path"])
def test_a_checkout_that_was_never_installed_works(way: str, tmp_path: Path) -> None:
    tree = tmp_path / "krelay"
    shutil.copytree(ROOT, tree, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    python = _environment(tmp_path / "venv") / "bin" / "python"
    for module in ("krelay", "krelay_vm"):
        if way == "from its folder":
            done = _run(python, "-m", module, "--help", cwd=tree)
        else:
            done = _run(python, "-I", tree / "knet/isolated.py", module, "--help", cwd=tmp_path)
        assert "example: " in done.stdout


def _site(place: Path) -> Path:
    return Path(sysconfig.get_path("purelib", vars={"base": str(place)}))


def _run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done
