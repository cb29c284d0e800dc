"""The byte code of the data path's programs, from their source: `make bpf`.

Each krelay/offload/programs/*.c becomes krelay/offload/*.o, which is kept in the repository: krelay
runs where there is no compiler.  The same compiler makes the same bytes, wherever the tree is: the
file names no folder, and has none of the labels that only a debugger reads.  It says in its section
"compiler" what has made it.
"""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from knet.bpf import objectfile

HERE = Path(__file__).parents[1] / "krelay" / "offload"
PROGRAMS = HERE / "programs"
_OPTIONS = ("-O2", "-target", "bpf", "-mcpu=v3", "-fno-addrsig", "-Wall", "-Wextra", "-Werror")
"""-mcpu=v3: comparisons of 32 bits (RFC 9669, Linux 5.1)."""
_STRIP = ("--strip-unneeded", "--discard-all")
_VERSION = re.compile(r"clang version (\d+[\d.]*)")


class NoCompiler(Exception):
    """There is no clang, or no llvm-strip beside it.  The text says which."""


def compilers() -> dict[str, Path]:
    """Every clang of this machine by its version, `14.0.6`; the newest first."""
    names = [f"clang-{number}" for number in range(30, 10, -1)]
    found: dict[str, Path] = {}
    for name in [*names, "clang"]:
        path = shutil.which(name)
        if path is None:
            continue
        match = _VERSION.search(_run(path, "--version"))
        if match:
            found.setdefault(match[1], Path(path))
    return found


def version_of(byte_code: bytes) -> str:
    """The version of clang that this names.  Raises BadObjectFile."""
    return objectfile.parse(byte_code).compiler.removeprefix("clang").strip()


def choose(byte_code: bytes | None) -> Path:
    """The compiler that has made this, if it is here, or else another one.  Raises NoCompiler."""
    found = compilers()
    if not found:
        raise NoCompiler("no clang")
    wanted = version_of(byte_code) if byte_code is not None else ""
    return found.get(wanted, next(iter(found.values())))


def compile_program(source: Path, clang: Path, to: Path) -> None:
    """Writes the byte code of this source there.

    Raises NoCompiler without llvm-strip, CalledProcessError with what clang has said.
    """
    strip = _strip_of(clang)
    headers = f"-I/usr/include/{platform.machine()}-linux-gnu"
    _run(str(clang), *_OPTIONS, headers, "-c", str(source), "-o", str(to))
    _run(strip, *_STRIP, str(to))


def _strip_of(clang: Path) -> str:
    """That of the same version: another one may order sections otherwise."""
    beside = clang.resolve().parent / "llvm-strip"
    name = clang.name.replace("clang", "llvm-strip")
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise NoCompiler(f"no {name}")
    return found


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> int:
    """Compiles all; the exit status."""
    for source in sorted(PROGRAMS.glob("*.c")):
        to = HERE / f"{source.stem}.o"
        before = to.read_bytes() if to.exists() else None
        try:
            clang = choose(before)
            compile_program(source, clang, to)
        except NoCompiler as error:
            print(f"bpf: {error}; tools/setup --group bpf installs it", file=sys.stderr)
            return 1
        except subprocess.CalledProcessError:
            return 1
        after = to.read_bytes()
        change = "as it was" if after == before else "changed"
        print(f"{to.relative_to(HERE.parents[1])}: {len(after)} bytes, {change}; {clang.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
