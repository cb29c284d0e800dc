"""User-Mode Linux on processors whose registers it doesn't know: told, and fixed by vm/xstate.c.

No processor with AMX is needed: stand-ins for linux.uml print what it prints there, and
tests/vm/few_registers.c makes the real one fail in the same way.
"""

import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from krelay_vm import Host, Lab, LabError, Topology, guest, kernels
from krelay_vm.kernels import COMPILER
from krelay_vm.machine import Machine, Unsuited
from tests.vm.test_lab import traces

ROOT = Path(__file__).parents[2]
PANIC = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x"
ALONE = Topology(hosts=(Host("alone"),), links=())
SEGV = f"is killed by signal {signal.SIGSEGV}, as on processors with AMX; QEMU works: "

needs_compiler = pytest.mark.skipif(
    shutil.which(COMPILER[0]) is None or platform.machine() != "x86_64",
    reason=f"needs {COMPILER[0]} and an x86-64 processor",
)
needs_what_machines_need = pytest.mark.skipif(
    kernels.why_not("uml") is not None, reason=f"no User-Mode Linux: {kernels.why_not('uml')}"
)


# What a panic says


@pytest.mark.parametrize(
    ("status", "signal"),
    [
        ("00000000", None),  # /bin/true
        ("00000100", None),  # /bin/false
        ("00007f00", None),
        ("0000000b", 11),
        ("0000008b", 11),  # and would have left a core
        ("00000004", 4),
        ("00000087", 7),
    ],
)
def test_a_panic_says_what_ended_the_first_program(status: str, signal: int | None) -> None:
    shown = f"random: crng init done\n[    0.91] {PANIC}{status}\nCPU: 0 PID: 1 Comm: init\n"

    assert guest.killed_by(shown) == signal


@pytest.mark.parametrize(
    "shown",
    [
        "",
        "Kernel panic - not syncing: No working init found.\n",
        "Kernel panic - not syncing: Attempted to kill the idle task!\n",
        "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(98,0)\n",
        f"{PANIC}0000000",  # not yet all of it
    ],
)
def test_another_panic_says_nothing_of_it(shown: str) -> None:
    assert guest.killed_by(shown) is None


# What is preloaded, and this machine's own kernel


WRITE = """
import ctypes, errno, os, signal, sys
SETREGSET, GETREGSET, NT_X86_XSTATE, TRACEME = 0x4205, 0x4204, 0x202, 0
XMM0, HEADER, KNOWN = 160, 512, 576  # offsets in the area, and what a program from 1999 would know

class iovec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("len", ctypes.c_size_t)]

libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
if (child := os.fork()) == 0:
    libc.ptrace(TRACEME, 0, None, None)
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(0)
if not os.WIFSTOPPED(os.waitpid(child, 0)[1]):
    sys.exit("may not trace")

def exchange(request, area, size):
    room.base, room.len = ctypes.addressof(area), size
    done = libc.ptrace(request, child, NT_X86_XSTATE, ctypes.addressof(room))
    return errno.errorcode[ctypes.get_errno()] if done < 0 else "taken"

room, area = iovec(), ctypes.create_string_buffer(1 << 16)
exchange(GETREGSET, area, len(area))
size = room.len
wanted = ctypes.create_string_buffer(area.raw[:size], size)
wanted[HEADER] = wanted.raw[HEADER] | 2  # SSE is in use
wanted[XMM0:XMM0 + 16] = b"sixteen letters!"
print("all", exchange(SETREGSET, wanted, size))
wanted[XMM0:XMM0 + 16] = b"SIXTEEN LETTERS!"
print("known", exchange(SETREGSET, wanted, KNOWN))
exchange(GETREGSET, area, len(area))
rest = "as before" if area.raw[KNOWN:size] == wanted.raw[KNOWN:] else "changed"
print(area.raw[XMM0:XMM0 + 16].decode(), "and the rest", rest)
os.kill(child, signal.SIGKILL)
"""


@needs_compiler
@pytest.mark.parametrize("helped", [False, True])
def test_the_kernel_refuses_a_part_of_the_registers_and_takes_it_made_whole(
    helped: bool, tmp_path: Path
) -> None:
    env = {"LD_PRELOAD": kernels.whole_registers(tmp_path)} if helped else {}
    done = subprocess.run(
        (sys.executable, "-c", WRITE), env=os.environ | env, capture_output=True, text=True
    )
    if done.stderr.strip() == "may not trace":
        pytest.skip("this process may not trace others")

    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "all taken",
        f"known {'taken' if helped else errno.errorcode[errno.EFAULT]}",
        f"{'SIXTEEN LETTERS!' if helped else 'sixteen letters!'} and the rest as before",
    ]


# Stand-ins: what is told


Stand = Callable[[str], Path]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    """Puts a shell script in place of linux.uml, `$first` being its first program; its starts."""
    starts = tmp_path / "starts"
    starts.touch()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(Machine, "whole_registers", False)

    def put(script: str) -> Path:
        program = tmp_path / "linux.uml"
        find = "for word; do case $word in init=*) first=${word#init=} ;; esac; done"
        program.write_text(f'#!/bin/sh\necho "$LD_PRELOAD" >>{starts}\n{find}\n{script}\n')
        program.chmod(0o755)
        return starts

    return put


def panics(status: str) -> str:
    return f"echo '{PANIC}{status}'; echo 'CPU: 0 PID: 1 Comm: init'; kill -ABRT $$"


UP = "touch ${first%/*}/up; exec sleep 60"
IF_HELPED = f"case $LD_PRELOAD in */xstate.so) {UP} ;; *) {panics('0000000b')} ;; esac"


@pytest.mark.net
@needs_what_machines_need
@needs_compiler
class TestStandIns:
    @pytest.mark.parametrize(
        ("command", "who"),
        [
            (("krelay_vm", "up", "--backend", "uml"), "python -m krelay_vm"),
            (("krelay_vm", "up", "--server", "uml"), "python -m krelay_vm"),
            (("krelay", "demo", "--vm", "uml"), "krelay demo"),
        ],
    )
    def test_commands_tell_in_one_line_what_is_wrong_and_what_works(
        self, command: tuple[str, ...], who: str, stand_in: Stand
    ) -> None:
        stand_in(panics("0000000b"))
        done = subprocess.run(
            (sys.executable, "-B", "-m", *command),
            cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

        assert done.returncode == 1
        assert done.stderr.count("\n") == 1
        assert done.stderr.startswith(f"{who}: User-Mode Linux does not run on this machine: ")
        assert f"{SEGV}make demo VM=qemu, " in done.stderr

    @pytest.mark.serial
    def test_it_is_told_when_the_kernel_stays_after_its_panic(self, stand_in: Stand) -> None:
        stand_in(f"echo '{PANIC}0000000b'; exec sleep 60")
        began = time.monotonic()
        lab = Lab(ALONE, backends="uml")
        with pytest.raises(Unsuited, match=SEGV), lab:
            pass

        assert time.monotonic() - began < 30

    def test_tests_are_skipped_with_that_reason(self, stand_in: Stand) -> None:
        stand_in(panics("0000000b"))
        tests = ("tests/krelay/demo/test_play.py", "-k", "uml", "-q", "-p", "no:cacheprovider")
        done = subprocess.run(
            (sys.executable, "-B", "-m", "pytest", *tests),
            cwd=ROOT, capture_output=True, text=True, timeout=100,
        )  # fmt: skip

        assert done.returncode == 0, done.stdout
        assert "1 skipped" in done.stdout.splitlines()[-1]
        assert [line for line in done.stdout.splitlines()[-3:] if SEGV in line], done.stdout

    def test_where_it_boots_it_is_started_once_and_without_help(self, stand_in: Stand) -> None:
        starts = stand_in(UP)
        with Lab(ALONE, backends="uml") as lab:
            assert lab.alive("alone")

        assert starts.read_text() == "\n"
        assert not Machine.whole_registers

    def test_who_was_killed_is_started_again_with_help_and_others_with_it_at_once(
        self, stand_in: Stand
    ) -> None:
        starts = stand_in(IF_HELPED)
        two = Topology(hosts=(Host("one"), Host("two")), links=())
        for _ in range(2):
            with Lab(two, backends="uml") as lab:
                assert lab.alive("one")
                assert lab.alive("two")
        helped = [line.endswith("/xstate.so") for line in starts.read_text().splitlines()]

        assert helped == [False] * 2 + [True] * 4

    @pytest.mark.parametrize(
        ("status", "times"), [("00000000", 1), ("00000100", 1), ("00000004", 1), ("0000000b", 2)]
    )
    def test_only_after_a_segmentation_fault_it_is_tried_again(
        self, status: str, times: int, stand_in: Stand
    ) -> None:
        starts = stand_in(panics(status))
        lab = Lab(ALONE, backends="uml")
        with pytest.raises(LabError) as told, lab:
            pass

        assert len(starts.read_text().splitlines()) == times
        ended_by_itself = "the machine alone has ended" in str(told.value)
        assert ended_by_itself == (guest.killed_by(PANIC + status) is None)

    def test_without_a_compiler_that_is_told(
        self, stand_in: Stand, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        stand_in(IF_HELPED)
        monkeypatch.setattr(kernels, "COMPILER", ("no-such-gcc",))
        lab = Lab(ALONE, backends="uml")
        needed = "to fix that no-such-gcc is needed"
        with pytest.raises(LabError, match=f"{needed}.*; QEMU works without: make"), lab:
            pass

    def test_nothing_is_left_of_a_lab_whose_machines_do_not_run(self, stand_in: Stand) -> None:
        stand_in(panics("0000000b"))
        name = f"krelay-t{os.getpid()}"
        lab = Lab(ALONE, name=name, backends="uml")
        with pytest.raises(Unsuited), lab:
            pass

        assert traces(name) == []


# The real one, made to fail


KINDS = {"program": ((), "{library}:$help"), "kernel": (("-DAMX",), "$help:{library}")}
"""Who knows too few registers or has too many, and what is preloaded: the first is next to the
program, the last to the kernel."""


@pytest.fixture(params=KINDS)
def preloaded(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What to preload, besides `$help`, for a program to know fewer registers than there are."""
    options, order = KINDS[request.param]
    library = tmp_path / "few_registers.so"
    source = Path(__file__).with_name("few_registers.c")
    subprocess.run((*COMPILER, *options, "-o", library, source), check=True)
    return order.format(library=library)


FLOATS = """
import math, sys, threading
sys.setswitchinterval(1e-4)
sums = [0.0] * 4
def add(seed):
    for number in range(30_000):
        sums[seed] += math.sqrt(number + seed) * 1.1
threads = [threading.Thread(target=add, args=(seed,)) for seed in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(sums)
"""


@pytest.mark.vm
@pytest.mark.slow
@needs_compiler
def test_the_real_one_is_killed_without_help_and_computes_right_with_it(
    preloaded: str, stand_in: Stand
) -> None:
    real = shutil.which("linux.uml", path=os.environ["PATH"].partition(":")[2])
    run = f'exec env LD_PRELOAD="{preloaded}" {real} "$@"'
    stand_in(f"help=\n{run}")
    lab = Lab(ALONE, backends="uml")
    with pytest.raises(Unsuited, match=SEGV), lab:
        pass

    Machine.whole_registers = False  # the fixture undoes it
    stand_in(f"help=$LD_PRELOAD\n{run}")
    right = subprocess.run([sys.executable, "-c", FLOATS], capture_output=True, text=True).stdout
    with Lab(ALONE, backends="uml") as lab:
        programs = [lab.start("alone", sys.executable, "-c", FLOATS) for _ in range(3)]
        for program in programs:
            assert program.wait(60) == 0
            assert program.output == right
