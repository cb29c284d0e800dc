"""The workers' parent, seen from outside: processes, signals, exit statuses, log lines."""

import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.tcp_relay.helpers import BOUND, wait_for

# What serves in these tests: says who it is, then each signal that it gets.  Ends with status 0
# after `terms` SIGTERMs, 3 after SIGINT.
PRELUDE = """
import os, signal, sys, time
from functools import partial
from pathlib import Path
from knet import log, process
from knet.loop import Loop
from tcp_relay.service import workers

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def serve(index, ready, terms=1):
    got = []
    def on(signum):
        say(signum.name, index)
        got.append(signum)
        if signum == signal.SIGINT or got.count(signal.SIGTERM) == terms:
            loop.stop()
    with Loop() as loop:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            loop.on_signal(signum, partial(on, signum))
        ready()
        say("began", index, os.getpid())
        loop.run()
    return 3 if signal.SIGINT in got else 0

def life(index):
    "Counts the lives of this index: 1, 2, ..."
    path = Path(sys.argv[1], f"life-{index}")
    number = int(path.read_text()) + 1 if path.exists() else 1
    path.write_text(str(number))
    return number

log.set_up(journal=False)
"""


UNBUFFERED = "PYTHONUNBUFFERED"  # would hide what a buffer writes twice, or never


class Program:
    """A program that ends with `sys.exit(workers.run(...))`, its output and its workers."""

    def __init__(self, directory: Path, text: str) -> None:
        self._out, self._err = directory / "out", directory / "err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PRELUDE + text, str(directory)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                cwd=Path(__file__).parents[3],
                env={name: text for name, text in os.environ.items() if name != UNBUFFERED},
                start_new_session=True,
            )
        self._arguments = Path(f"/proc/{self.process.pid}/cmdline")
        self._directory = str(directory).encode()

    @property
    def out(self) -> list[str]:
        """What the workers said."""
        return self._out.read_text().splitlines()

    @property
    def log(self) -> list[str]:
        """The log lines without the time."""
        return [line.partition(" ")[2] for line in self._err.read_text().splitlines()]

    def logged(self, words: str) -> list[str]:
        """The log lines with these words."""
        return [line for line in self.log if words in line]

    def field(self, words: str, name: str) -> list[str]:
        """A field's values in the log lines with these words."""
        lines = self.logged(words)
        return [found[1] for line in lines if (found := re.search(rf" {name}=(\S+)", line))]

    def pids(self, index: int) -> list[int]:
        """Of the processes that have served as this worker, the oldest first."""
        words = [line.split() for line in self.out]
        return [
            int(pid)
            for began, number, pid in (w for w in words if w[0] == "began")
            if int(number) == index
        ]

    def has_lived(self, index: int, times: int) -> bool:
        return len(self.pids(index)) == times

    def ready(self, count: int) -> "Program":
        """Waits until so many workers have begun."""
        wait_for(lambda: all(self.pids(index) for index in range(count)), "all workers")
        return self

    def is_alive(self, pid: int) -> bool:
        """Whether that process runs and is of this program; a zombie has no command line."""
        with suppress(OSError):
            return self._directory in Path(f"/proc/{pid}/cmdline").read_bytes()
        return False

    def send(self, signum: signal.Signals) -> None:
        """To the parent."""
        self.process.send_signal(signum)

    def wait(self) -> int:
        """For its end; the exit status."""
        return self.process.wait(BOUND)

    def close(self) -> None:
        """Nothing of it stays."""
        self.process.kill()
        self.process.wait(BOUND)
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and self.is_alive(pid := int(entry.name)):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


class Start:
    """Starts programs and ends them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._programs: list[Program] = []

    def __call__(self, text: str) -> Program:
        program = Program(self._directory, text)
        self._programs.append(program)
        return program

    def close(self) -> None:
        for program in self._programs:
            program.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    start = Start(tmp_path)
    yield start
    start.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(BOUND)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield manager


def is_silent(manager: socket.socket) -> bool:
    """Whether nothing has come."""
    return not select.select([manager], [], [], 0)[0]


PLAIN = "sys.exit(workers.run(3, serve, 10))"


def test_each_worker_is_a_process_with_a_number(start: Start) -> None:
    program = start(PLAIN).ready(3)
    pids = [program.pids(index) for index in range(3)]
    assert all(len(lives) == 1 for lives in pids)
    assert len({pid for [pid] in pids} | {program.process.pid}) == 4


def test_a_single_worker_is_the_process_itself(start: Start, manager: socket.socket) -> None:
    program = start("sys.exit(workers.run(1, lambda *a: serve(*a) or 7, 10))").ready(1)
    assert program.pids(0) == [program.process.pid]
    assert manager.recv(100) == b"READY=1"
    program.send(signal.SIGTERM)
    assert program.wait() == 7
    assert program.log == []


def test_a_service_manager_that_cannot_be_told_is_no_reason_to_stop(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    program = start(PLAIN).ready(3)
    wait_for(lambda: program.logged("the service manager can't be told"), "a warning")
    program.send(signal.SIGTERM)
    assert program.wait() == 0


def test_the_service_manager_is_told_once_when_all_are_ready(
    start: Start, manager: socket.socket, tmp_path: Path
) -> None:
    program = start("""
def late(index, ready):
    if index == 1:
        say("waits", index)
        while not Path(sys.argv[1], "go").exists():
            time.sleep(0.01)
    return serve(index, ready)

sys.exit(workers.run(3, late, 10))
""")
    wait_for(lambda: program.pids(0) and program.pids(2) and "waits 1" in program.out, "two of 3")
    assert is_silent(manager)
    os.kill(program.pids(2)[0], signal.SIGKILL)  # and its next life doesn't count as a third
    wait_for(lambda: len(program.pids(2)) == 2, "its next life")
    assert is_silent(manager)
    (tmp_path / "go").touch()
    assert manager.recv(100) == b"READY=1"
    os.kill(program.pids(0)[0], signal.SIGKILL)
    wait_for(lambda: len(program.pids(0)) == 2, "its next life")
    program.send(signal.SIGTERM)
    assert program.wait() == 0
    assert is_silent(manager)
    assert len(program.logged("all workers are ready workers=3")) == 1


def test_one_that_was_ready_and_is_no_more_is_waited_for(
    start: Start, manager: socket.socket, tmp_path: Path
) -> None:
    program = start("""
def late(index, ready):
    if index == 1 or life(index) == 2:
        say("waits", index)
        while not Path(sys.argv[1], f"go-{index}").exists():
            time.sleep(0.01)
    return serve(index, ready)

sys.exit(workers.run(2, late, 10))
""")
    wait_for(lambda: program.pids(0), "the first")
    os.kill(program.pids(0)[0], signal.SIGKILL)
    wait_for(lambda: "waits 0" in program.out, "its next life")
    (tmp_path / "go-1").touch()
    wait_for(lambda: program.pids(1), "the second")
    program.send(signal.SIGUSR1)
    wait_for(lambda: "SIGUSR1 1" in program.out, "a turn of the parent's loop")
    assert is_silent(manager)
    (tmp_path / "go-0").touch()
    assert manager.recv(100) == b"READY=1"


def test_a_dead_worker_is_started_again_under_its_number(start: Start) -> None:
    program = start(PLAIN).ready(3)
    first = program.pids(1)[0]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: len(program.pids(1)) == 2, "its next life")
    wait_for(lambda: len(program.logged("worker started")) == 4, "the log line")
    assert len(program.pids(0)) == len(program.pids(2)) == 1
    [death] = program.logged("worker ended")
    assert death.startswith(f"warning worker ended worker=1 pid={first} signal=SIGKILL lived=")
    assert death.endswith("again_in=0.0")
    assert program.logged("worker started")[-1] == (
        f"info worker started worker=1 pid={program.pids(1)[1]}"
    )


def test_a_worker_that_is_told_to_end_by_somebody_else_is_started_again(start: Start) -> None:
    program = start(PLAIN).ready(3)
    os.kill(program.pids(1)[0], signal.SIGTERM)
    wait_for(lambda: len(program.pids(1)) == 2, "its next life")
    assert program.field("worker ended", "status") == ["0"]


def test_a_signal_without_a_name_is_told_by_its_number(start: Start) -> None:
    program = start(PLAIN).ready(3)
    os.kill(program.pids(1)[0], signal.SIGRTMIN + 3)
    wait_for(lambda: len(program.pids(1)) == 2, "its next life")
    assert program.field("worker ended", "signal") == [str(signal.SIGRTMIN + 3)]


def test_a_worker_that_dies_again_and_again_waits_longer_up_to_a_limit(start: Start) -> None:
    program = start("""
workers.LONGEST_PAUSE = 0.2

def falling(index, ready):
    if index == 0:
        return serve(index, ready)
    ready()
    say("at", time.monotonic())
    return 5

sys.exit(workers.run(2, falling, 10))
""")

    def starts() -> list[float]:
        return [float(line.split()[1]) for line in program.out if line.startswith("at")]

    wait_for(lambda: len(starts()) >= 7, "seven lives")
    # Those at the longest pause are in the log but once a minute; and what isn't told to have ended
    # isn't told to have started.
    assert program.field("worker ended", "again_in") == ["0.0", "0.1", "0.2"]
    assert program.field("worker ended", "status") == ["5", "5", "5"]
    assert len(program.logged("worker started worker=1")) == 4
    gaps = [after - before for before, after in zip(starts(), starts()[1:], strict=False)]
    assert all(gap >= pause for gap, pause in zip(gaps, (0, 0.1, 0.2, 0.2, 0.2, 0.2), strict=False))


def test_at_the_longest_pause_the_log_counts_what_it_leaves_out(start: Start) -> None:
    program = start("""
workers.FIRST_PAUSE = workers.LONGEST_PAUSE = 0.02
workers.COMPLAINT = 0.5
sys.exit(workers.run(2, lambda index, ready: serve(index, ready) if index else ready() or 5, 10))
""")
    wait_for(lambda: len(program.logged("suppressed=")) >= 2, "two sums")
    assert all(int(count) > 1 for count in program.field("worker ended", "suppressed"))


def test_after_a_long_life_a_worker_comes_back_at_once(start: Start) -> None:
    program = start("""
workers.STEADY = 1.5

def falling(index, ready):
    if index == 0:
        return serve(index, ready)
    ready()
    if life(index) == 3:
        time.sleep(workers.STEADY)
    return 5

sys.exit(workers.run(2, falling, 10))
""")
    wait_for(lambda: len(program.logged("worker ended")) >= 4, "four deaths")
    assert program.field("worker ended", "again_in")[:4] == ["0.0", "0.1", "0.0", "0.1"]


def test_the_parent_gives_up_when_no_worker_comes_up(start: Start, manager: socket.socket) -> None:
    program = start("""
def failing(index, ready):
    say("tries", index)
    raise OSError(98, "Address already in use")

sys.exit(workers.run(3, failing, 10))
""")
    assert program.wait() == 1
    assert sorted(program.out) == ["tries 0", "tries 1", "tries 2"]
    assert program.log[-1] == "error no worker came up workers=3"
    errors = program.logged("worker failed")
    assert sorted(errors) == [
        f'error worker failed worker={index} error="[Errno 98] Address already in use"'
        for index in range(3)
    ]
    assert is_silent(manager)


def test_giving_up_ends_those_who_are_at_their_second_try(start: Start) -> None:
    program = start("""
workers.START_PAUSE = 0.05

def failing(index, ready):
    if index == 1:
        while not Path(sys.argv[1], "life-0").exists() or not Path(sys.argv[1], "again").exists():
            time.sleep(0.01)
        return 1
    if life(index) == 1:
        return 1
    say("began", index, os.getpid())
    Path(sys.argv[1], "again").touch()
    time.sleep(60)

sys.exit(workers.run(2, failing, 10))
""")
    assert program.wait() == 1
    assert program.field("worker ended", "signal") == ["SIGTERM"]
    assert not program.is_alive(program.pids(0)[0])


def test_one_that_fails_at_the_start_is_started_again_if_others_come_up(start: Start) -> None:
    program = start("""
sys.exit(workers.run(3, lambda index, ready: (
    1 if index == 1 and life(index) == 1 else serve(index, ready)), 10))
""").ready(3)
    assert len(program.logged("worker ended")) == 1
    assert program.process.poll() is None


def test_that_all_die_later_is_no_reason_to_give_up(start: Start) -> None:
    program = start("""
def falling(index, ready):
    if life(index) > 1:
        return serve(index, ready)
    ready()
    return 1

sys.exit(workers.run(2, falling, 10))
""").ready(2)
    assert program.field("worker ended", "status") == ["1", "1"]


def test_a_workers_last_word_counts_even_if_its_death_is_seen_first(start: Start) -> None:
    program = start("""
class Deaf(Loop):
    def add(self, fd, mask, handler):
        if getattr(handler, "__name__", "") != "_hear":
            super().add(fd, mask, handler)

def falling(index, ready):
    if life(index) > 1:
        return serve(index, ready)
    ready()
    return 1

workers.Loop = Deaf
sys.exit(workers.run(2, falling, 10))
""").ready(2)
    assert program.field("worker ended", "again_in") == ["0.0", "0.0"]


def test_sigterm_is_passed_on_once_and_nobody_comes_back(start: Start) -> None:
    program = start(PLAIN).ready(3)
    program.send(signal.SIGTERM)
    assert program.wait() == 0
    assert sorted(program.out[3:]) == ["SIGTERM 0", "SIGTERM 1", "SIGTERM 2"]
    assert len(program.logged("worker started")) == 3
    assert len(program.logged("info worker ended")) == 3


def test_sigterm_to_the_whole_process_group_is_one_sigterm_to_each_worker(start: Start) -> None:
    program = start("sys.exit(workers.run(2, partial(serve, terms=2), 10))").ready(2)
    os.killpg(program.process.pid, signal.SIGTERM)
    wait_for(lambda: len(program.out) == 4, "a signal to each")
    program.send(signal.SIGUSR1)  # comes after what else there may be
    wait_for(lambda: len(program.out) >= 6, "another signal to each")
    assert sorted(program.out[2:4]) == ["SIGTERM 0", "SIGTERM 1"]
    assert sorted(program.out[4:]) == ["SIGUSR1 0", "SIGUSR1 1"]


def test_a_second_sigterm_is_passed_on_too(start: Start) -> None:
    program = start("sys.exit(workers.run(2, partial(serve, terms=2), 10))").ready(2)
    program.send(signal.SIGTERM)
    wait_for(lambda: {"SIGTERM 0", "SIGTERM 1"} <= set(program.out), "the first")
    assert program.process.poll() is None
    program.send(signal.SIGTERM)
    assert program.wait() == 0
    assert program.out.count("SIGTERM 0") == program.out.count("SIGTERM 1") == 2


def test_ctrl_c_ends_all_with_status_130(start: Start) -> None:
    program = start(PLAIN).ready(3)
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.wait() == 130
    assert sorted(program.out[3:]) == ["SIGINT 0", "SIGINT 1", "SIGINT 2"]
    assert program.field("worker ended", "status") == ["3", "3", "3"]


def test_sigint_after_sigterm_ends_with_status_130(start: Start) -> None:
    program = start("sys.exit(workers.run(2, partial(serve, terms=2), 10))").ready(2)
    program.send(signal.SIGTERM)
    wait_for(lambda: {"SIGTERM 0", "SIGTERM 1"} <= set(program.out), "the first")
    program.send(signal.SIGINT)
    assert program.wait() == 130


def test_sigterm_after_sigint_leaves_the_status_130(start: Start) -> None:
    program = start("""
def stubborn(index, ready):
    signal.signal(signal.SIGINT, lambda *_: say("SIGINT", index))
    ready()
    say("began", index, os.getpid())
    time.sleep(60)

sys.exit(workers.run(2, stubborn, 10))
""").ready(2)
    program.send(signal.SIGINT)
    wait_for(lambda: {"SIGINT 0", "SIGINT 1"} <= set(program.out), "the first")
    program.send(signal.SIGTERM)
    assert program.wait() == 130
    assert program.field("worker ended", "signal") == ["SIGTERM", "SIGTERM"]


def test_a_worker_may_get_sigint_twice_and_before_it_listens(start: Start) -> None:
    program = start("""
def deaf(index, ready):
    ready()
    say("began", index, os.getpid())
    while True:
        time.sleep(60)

sys.exit(workers.run(2, deaf, 10))
""").ready(2)
    for index in range(2):
        os.kill(program.pids(index)[0], signal.SIGINT)
    program.send(signal.SIGINT)
    assert program.wait() == 130
    assert not any("Traceback" in line or "KeyboardInterrupt" in line for line in program.log)
    # One that the parent has started again before it was told has had a signal as well.
    assert set(program.field("worker ended", "signal")) == {"SIGINT"}
    assert not program.field("worker ended", "status")


def test_sighup_is_nothing_and_sigusr1_is_passed_on(start: Start) -> None:
    program = start(PLAIN).ready(3)
    program.send(signal.SIGHUP)
    program.send(signal.SIGUSR1)
    wait_for(lambda: len(program.out) == 6, "a signal to each")
    assert sorted(program.out[3:]) == ["SIGUSR1 0", "SIGUSR1 1", "SIGUSR1 2"]
    wait_for(lambda: program.logged("all workers are ready"), "the log line")
    assert len(program.logged("worker started")) == 3
    assert not program.logged("worker ended")
    program.send(signal.SIGTERM)
    assert program.wait() == 0


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_worker_survives_what_it_does_not_listen_for_yet(start: Start, name: str) -> None:
    program = start(f"""
def early(index, ready):
    os.kill(os.getpid(), signal.{name})
    return serve(index, ready)

sys.exit(workers.run(2, early, 10))
""").ready(2)
    assert not program.logged("worker ended")


def test_who_does_not_end_in_time_is_killed(start: Start) -> None:
    program = start("""
def stubborn(index, ready):
    if index == 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return serve(index, ready) if index == 0 else (
        ready(), say("began", index, os.getpid()), time.sleep(60))

sys.exit(workers.run(2, stubborn, 0.3))
""").ready(2)
    program.send(signal.SIGTERM)
    assert program.wait() == 0
    pid = program.pids(1)[0]
    assert program.logged("worker killed") == [
        f"warning worker killed worker=1 pid={pid} grace=0.3"
    ]
    assert program.log[-1] == f"info worker ended worker=1 pid={pid} signal=SIGKILL"
    assert not program.is_alive(pid)


def test_a_start_that_was_due_is_not_made_while_others_end(start: Start) -> None:
    program = start("""
workers.FIRST_PAUSE = 1.0
sys.exit(workers.run(2, partial(serve, terms=2), 1.5))
""").ready(2)
    for lives in (1, 2):
        wait_for(partial(program.has_lived, 1, lives), "a life")
        os.kill(program.pids(1)[-1], signal.SIGKILL)
    wait_for(lambda: program.logged("again_in=1.0"), "the pause")
    program.send(signal.SIGTERM)  # worker 0 holds out until it is killed, longer than the pause
    assert program.wait() == 0
    assert program.logged("worker killed worker=0")
    assert len(program.logged("worker started worker=1")) == len(program.pids(1)) == 2


def test_nobody_is_waited_for_who_is_not_there(start: Start) -> None:
    program = start("""
workers.START_PAUSE = 600

def one_hangs(index, ready):
    if index == 0:
        return 1
    signal.pause()

sys.exit(workers.run(2, one_hangs, 600))
""")
    wait_for(lambda: program.logged("again_in=600"), "the pause")
    program.send(signal.SIGTERM)
    assert program.wait() == 0
    assert len(program.logged("worker started")) == 2


def test_workers_end_if_their_parent_is_killed(start: Start) -> None:
    program = start(PLAIN).ready(3)
    program.send(signal.SIGKILL)
    program.wait()
    pids = [program.pids(index)[0] for index in range(3)]
    wait_for(lambda: not any(program.is_alive(pid) for pid in pids), "the workers' end")
    assert sorted(program.out[3:]) == ["SIGTERM 0", "SIGTERM 1", "SIGTERM 2"]


def test_a_worker_has_nothing_of_the_parents(start: Start) -> None:
    program = start("""
def bare(index, ready):
    if index == 1 and life(index) == 1:
        ready()
        return 1
    files = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(64)
             if os.path.exists(f"/proc/self/fd/{fd}")]
    files = sorted(name.partition(":[")[0] for name in files[3:])
    say("files", index, *files)
    say("mask", index, *signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    say("wakeup", index, signal.set_wakeup_fd(-1))
    return serve(index, ready)

sys.exit(workers.run(2, bare, 10))
""").ready(2)
    # Worker 1 was forked when there was a worker 0, from within the parent's loop.
    for index in range(2):
        assert f"files {index} pipe" in program.out
        assert f"mask {index}" in program.out
        assert f"wakeup {index} -1" in program.out


def test_a_signal_to_a_new_worker_is_not_taken_for_one_to_the_parent(start: Start) -> None:
    # Until it has let go of the parent's loop, its wake-up socket is the parent's.
    program = start("""
def die_with(parent, die_with=process.die_with):
    die_with(parent)
    try:
        os.mkdir(Path(sys.argv[1], "the-first"))  # one of them
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGTERM)
    sum(range(100_000))  # the interpreter would handle it

process.die_with = die_with
workers.START_PAUSE = 0.05
sys.exit(workers.run(2, serve, 10))
""").ready(2)
    assert program.field("worker ended", "signal") == ["SIGTERM"]
    assert program.process.poll() is None


def test_a_death_is_told_even_if_deaths_were_ignored_by_whoever_started_the_parent(
    start: Start,
) -> None:
    program = start("signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n" + PLAIN).ready(3)
    os.kill(program.pids(1)[0], signal.SIGKILL)
    wait_for(lambda: len(program.pids(1)) == 2, "its next life")
    assert program.field("worker ended", "signal") == ["SIGKILL"]


def test_an_exception_in_a_worker_ends_that_worker_and_is_shown(start: Start) -> None:
    program = start("""
def faulty(index, ready):
    if index == 0 or life(index) > 1:
        return serve(index, ready)
    ready()
    raise RuntimeError("a fault of ours")

try:
    sys.exit(workers.run(2, faulty, 10))
finally:
    say("only the parent comes here")
""").ready(2)
    wait_for(lambda: program.logged("worker ended"), "its end")
    assert program.field("worker ended", "status") == ["1"]
    assert any("a fault of ours" in line for line in program.log)
    program.send(signal.SIGTERM)
    assert program.wait() == 0
    assert program.out.count("only the parent comes here") == 1


def test_what_waits_to_be_written_is_written_once(start: Start) -> None:
    program = start("""
print("before")

def last_words(index, ready):
    print("from", index)
    return serve(index, ready)

sys.exit(workers.run(2, last_words, 10))
""").ready(2)
    program.send(signal.SIGTERM)
    assert program.wait() == 0
    assert program.out.count("before") == 1
    assert program.out.count("from 0") == program.out.count("from 1") == 1


def test_a_fork_that_fails_is_tried_again(start: Start) -> None:
    program = start("""
workers.START_PAUSE = 0.05
failing = [True]

def fork(fork=os.fork):
    if failing:
        failing.pop()
        raise BlockingIOError(11, "Resource temporarily unavailable")
    return fork()

os.fork = fork
sys.exit(workers.run(2, serve, 10))
""").ready(2)
    [warning] = program.logged("worker not started")
    assert 'worker=0 error="Resource temporarily unavailable"' in warning


def test_the_parent_gives_up_if_nothing_can_be_forked(start: Start) -> None:
    program = start("""
def fork():
    raise BlockingIOError(11, "Resource temporarily unavailable")

os.fork = fork
sys.exit(workers.run(2, serve, 10))
""")
    assert program.wait() == 1
    assert program.log[-1] == "error no worker came up workers=2"
