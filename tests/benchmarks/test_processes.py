"""Processor time and memory of programs, against programs that use some."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks import processes
from benchmarks.processes import Memory, parse_cores, parse_rollup, parse_stat
from krelay_vm import Program
from krelay_vm.program import Local

STAT = "123 (odd) (name 4 5) S 1 77 88 0 -1 4194560 1 2 3 4 100 20 3000 {} 20 0 1 0 5 6 7 8 9"


def test_the_name_of_a_process_may_hold_anything() -> None:
    stat = parse_stat(STAT.format(40_000))
    assert stat.session == 88
    assert stat.seconds == pytest.approx(43_120 / os.sysconf("SC_CLK_TCK"))


def test_sizes_are_bytes() -> None:
    text = "5580-7ffd ---p 00000000 00:00 0  [rollup]\nRss: 884 kB\nPss: 385 kB\nPss_Dirty: 68 kB\n"
    assert parse_rollup(text) == Memory(884 * 1024, 385 * 1024)


def test_what_a_core_waits_for_or_is_denied_is_idle_time() -> None:
    text = "cpu  11 2 3 40 50 6 7 80 9 1\ncpu0 1 2 3 4 5 6 7 8 9 1\nintr 5 0 0\nctxt 99\n"
    tick = 1 / os.sysconf("SC_CLK_TCK")
    cores = parse_cores(text)
    assert cores.keys() == {"cpu", "cpu0"}
    assert cores["cpu0"].idle == pytest.approx((4 + 5 + 8) * tick)
    assert cores["cpu0"].busy == pytest.approx((1 + 2 + 3 + 6 + 7) * tick)  # guests' is in users'
    assert cores["cpu"].idle == pytest.approx((40 + 50 + 80) * tick)


@contextmanager
def started(code: str) -> Iterator[Program]:
    """A Python program in a session of its own, that has written a line."""
    argv = (sys.executable, "-c", code)
    with subprocess.Popen(argv, start_new_session=True, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            process.stdout.readline()
            yield Program("nowhere", argv, Path("/dev/null"), Local(process))
        finally:
            os.killpg(process.pid, signal.SIGKILL)


BURN = "import os, time\nwhile sum(os.times()[:2]) < 0.2: pass\n"
THEN_WAIT = "print('done', flush=True)\ntime.sleep(60)\n"


def test_time_of_a_child_counts_while_it_lives_and_after_it_was_waited_for() -> None:
    run = "import subprocess, sys, time\nsubprocess.run([sys.executable, '-c', {!r}])\n"
    alive, ended = run.format(BURN + THEN_WAIT), run.format(BURN) + THEN_WAIT
    for code in (alive, ended):
        with started(code) as program:
            assert processes.cpu_seconds([program]) >= 0.2


def test_others_and_no_program_at_all_do_not_count() -> None:
    with started(BURN + THEN_WAIT) as busy, started("import time\n" + THEN_WAIT) as idle:
        assert processes.cpu_seconds([]) == 0
        both = processes.cpu_seconds([busy, idle])
        assert both == processes.cpu_seconds([busy]) + processes.cpu_seconds([idle])


def test_threads_of_children_count_as_their_program() -> None:
    run = "import subprocess, sys, threading, time\n"
    run += "threading.Thread(target=time.sleep, args=(60,)).start()\n"
    run += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    with started(run + THEN_WAIT) as program:
        threads = processes.threads([program])
    assert program.pid in threads
    assert len(set(threads)) == 3


def test_memory_that_a_program_takes_is_seen() -> None:
    with started("import time\n" + THEN_WAIT) as small:
        without = processes.memory([small])
    with started("import time\ntaken = bytearray(b'x') * 50_000_000\n" + THEN_WAIT) as large:
        taken = processes.memory([large])
    assert taken.rss - without.rss > 45_000_000
    assert taken.pss - without.pss > 45_000_000
