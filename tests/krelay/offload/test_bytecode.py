"""The byte code of the data path's programs: it is what its source says, and the kernel takes it.

Another version of clang makes other byte code, which must do as well.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from knet.bpf import kernel, objectfile
from knet.bpf.kernel import BpfError, BpfMap, BpfProgram
from knet.bpf.objectfile import ObjectFile
from krelay.offload.tc import PASSES
from tools import bytecode
from tools.bytecode import HERE, PROGRAMS, NoCompiler

SOURCES = sorted(PROGRAMS.glob("*.c"))
HEADERS = "/usr/include/bpf/bpf_helpers.h"


def shipped(source: Path) -> bytes:
    """The byte code of this source that is in the repository."""
    return (HERE / f"{source.stem}.o").read_bytes()


def compiler_of(byte_code: bytes) -> Path:
    """The compiler that has made this.  Skips the test where it isn't."""
    version = bytecode.version_of(byte_code)
    found = bytecode.compilers()
    if version not in found:
        here = ", ".join(found) or "none"
        pytest.skip(f"the byte code is of clang {version}, and here is {here}")
    return found[version]


def rebuilt(source: Path, clang: Path, to: Path) -> bytes:
    """The byte code that this compiler makes.  Skips the test without what it needs."""
    if not Path(HEADERS).exists():
        pytest.skip(f"no {HEADERS}: tools/setup --group bpf installs it")
    try:
        bytecode.compile_program(source, clang, to)
    except NoCompiler as why:
        pytest.skip(f"{why}: tools/setup --group bpf installs it")
    return to.read_bytes()


def load(file: ObjectFile) -> None:
    """Has the verifier look at all programs.  Raises BpfError."""
    kernel.allow_memory()
    maps: dict[str, BpfMap] = {}
    programs: list[BpfProgram] = []
    try:
        for name, spec in file.maps.items():
            maps[name] = BpfMap.make(name, spec)
        descriptors = {name: each.descriptor for name, each in maps.items()}
        for name, program in file.programs.items():
            kind = kernel.SOCKET_FILTER if name == PASSES else kernel.SCHED_CLS
            programs.append(BpfProgram.load(name, program.linked(descriptors), kind=kind))
    finally:
        for held in maps.values():
            held.close()
        for each in programs:
            each.close()


@pytest.fixture
def bpf() -> Iterator[None]:
    """Skips what needs bpf(2) where it can't be had."""
    try:
        with closing(BpfMap.make("probe", objectfile.MapSpec(kernel.ARRAY, 4, 4, 1, 0))):
            yield
    except BpfError as why:
        pytest.skip(f"the kernel makes no map (needs root, or CAP_BPF): {why.strerror}")


def test_each_source_has_its_byte_code_and_the_other_way_round() -> None:
    assert SOURCES
    assert {each.stem for each in SOURCES} == {each.stem for each in HERE.glob("*.o")}


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_byte_code_says_which_compiler_has_made_it(source: Path) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", bytecode.version_of(shipped(source)))


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_byte_code_has_nothing_of_the_place_where_it_was_made(source: Path) -> None:
    code = shipped(source)

    paths = re.findall(rb"/(?:[\w.-]+/)+[\w.-]*", code)
    assert not paths
    for needless in (b".llvm_addrsig", b".debug", b".BTF", b"LBB"):
        assert needless not in code


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_its_compiler_makes_the_same_byte_code_once_more(source: Path, tmp_path: Path) -> None:
    code = shipped(source)
    clang = compiler_of(code)

    assert rebuilt(source, clang, tmp_path / "rebuilt.o") == code, "run `make bpf`"


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_byte_code_is_the_same_wherever_it_is_made(source: Path, tmp_path: Path) -> None:
    code = shipped(source)
    clang = compiler_of(code)
    elsewhere = tmp_path / "some" / "where" / "else"
    elsewhere.mkdir(parents=True)
    copy = Path(shutil.copy(source, elsewhere))

    assert rebuilt(copy, clang, elsewhere / "other.o") == code


@pytest.mark.net
@pytest.mark.usefixtures("bpf")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_kernel_takes_the_byte_code(source: Path) -> None:
    load(objectfile.parse(shipped(source)))


@pytest.mark.net
@pytest.mark.usefixtures("bpf")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_the_kernel_takes_what_any_other_compiler_makes(source: Path, tmp_path: Path) -> None:
    code = shipped(source)
    others = {
        version: clang
        for version, clang in bytecode.compilers().items()
        if version != bytecode.version_of(code)
    }
    if not others:
        pytest.skip("no clang of another version than that of the byte code")
    wanted = objectfile.parse(code)
    for version, clang in others.items():
        made = objectfile.parse(rebuilt(source, clang, tmp_path / f"{version}.o"))
        assert made.maps == wanted.maps
        assert made.programs.keys() == wanted.programs.keys()
        assert made.compiler != wanted.compiler
        load(made)


def test_a_source_that_is_wrong_is_refused(tmp_path: Path) -> None:
    clang = compiler_of(shipped(SOURCES[0]))
    wrong = tmp_path / "wrong.c"
    wrong.write_text("int unused(void) { int none; return 0; }\n")

    with pytest.raises(subprocess.CalledProcessError):
        bytecode.compile_program(wrong, clang, tmp_path / "wrong.o")
    assert not (tmp_path / "wrong.o").exists()


def test_without_a_compiler_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)

    assert bytecode.compilers() == {}
    with pytest.raises(NoCompiler, match="no clang"):
        bytecode.choose(shipped(SOURCES[0]))
