"""Labs: what runs in them, what is waited for, and that nothing of them stays."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest

from krelay_vm import DEFAULT, Lab, LabError, LabTimeout, TopologyError, netns, registry
from krelay_vm.build import leftovers, remove_leftovers
from krelay_vm.wires import listens

TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1
   1: 0100000A:0051 00000000:0000 01 00000000:00000000 00:00000000 00000000     0        0 1 1
   2: 0100000A:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 1
"""


@pytest.mark.parametrize(
    ("proto", "port", "expected"),
    [
        ("tcp", 80, True),
        ("tcp", 81, False),  # established
        ("tcp", 82, False),  # not there
        ("udp", 53, True),
        ("udp", 80, False),
    ],
)
def test_a_socket_listens_if_its_row_says_so(proto: str, port: int, expected: bool) -> None:
    assert listens(TABLE, proto, port) is expected


def test_a_lab_can_only_be_used_while_it_is_open() -> None:
    lab = Lab()

    for use in (lambda: lab.run("client", "true"), lambda: lab.directory, lambda: lab.name):
        with pytest.raises(LabError, match="not open"):
            use()


def traces(name: str) -> list[str]:
    """What is left on this machine of a lab."""
    namespaces = os.listdir(netns.RUN) if netns.RUN.exists() else []
    return [
        *(n for n in namespaces if n.startswith(f"{name}-")),
        *(r.name for r in registry.records() if r.name == name),
        *(str(path) for path in Path("/tmp").glob(f"{name}*")),
    ]


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    """Waits, bounded, for something outside any lab."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.005)


@pytest.mark.serial
@pytest.mark.net
def test_run_tells_status_output_and_time() -> None:
    with Lab() as lab:
        script = "cat; echo oops >&2; exit 3"
        result = lab.run("client", "sh", "-c", script, input="hello", check=False)

        assert (result.status, result.stdout, result.stderr) == (3, "hello", "oops\n")
        assert 0 < result.seconds < 5
        assert lab.run("client", "sh", "-c", "kill -9 $$", check=False).status == -9
        assert lab.run("client", "printenv", "COLOUR", env={"COLOUR": "red"}).stdout == "red\n"


@pytest.mark.net
def test_a_failing_command_is_an_error_with_its_last_words() -> None:
    with Lab() as lab:
        with pytest.raises(LabError) as failed:
            lab.run("client", "sh", "-c", "echo no such luck >&2; exit 7")
        assert "client: sh -c" in str(failed.value)
        assert "ended with status 7\n    no such luck" in str(failed.value)
        with pytest.raises(LabError, match="ended with status 127"):
            lab.run("client", "no-such-command")
        with pytest.raises(TopologyError, match="no host 'nobody'"):
            lab.run("nobody", "true")
        with pytest.raises(LabError, match="no command given"):
            lab.run("client")


def enough_to_begin(lab: Lab) -> float:
    """Seconds in which a shell on the client has begun, and has written a word, on this machine."""
    return round(0.2 + 5 * lab.run("client", "sh", "-c", "sleep 0 & echo $!").seconds, 1)


@pytest.mark.serial
@pytest.mark.net
def test_a_command_that_takes_too_long_is_killed_with_its_children() -> None:
    with Lab() as lab:
        script = "sleep 60 & echo $!; sleep 60"
        limit = enough_to_begin(lab)
        began = time.monotonic()
        with pytest.raises(LabTimeout, match=f"took longer than {limit:g} s") as late:
            lab.run("client", "sh", "-c", script, timeout=limit)

        assert time.monotonic() - began < limit + 5
        child = int(str(late.value).split()[-1])
        until(lambda: not alive(child))


@pytest.mark.net
def test_a_program_runs_in_its_host_under_its_own_pid() -> None:
    with Lab() as lab:
        program = lab.start("server", "sh", "-c", "echo $$; ip -br addr; exec sleep 60")
        lab.wait(lambda: "192.168.0.1/24" in program.output, "the server's address")

        assert program.output.split()[0] == str(program.pid)
        assert (program.host, program.poll()) == ("server", None)
        program.terminate()
        assert program.wait() == -signal.SIGTERM


@pytest.mark.net
def test_programs_end_with_the_lab_even_if_they_wont() -> None:
    stubborn = "trap '' TERM; sleep 60 & echo $!; while :; do sleep 1; done"
    with Lab() as lab:
        polite = lab.start("client", "sleep", "60")
        deaf = lab.start("server", "sh", "-c", stubborn)
        child = int(lab.wait(lambda: deaf.output, "the child's pid"))
        # In a session of its own it is out of reach for signals to the group.
        away = lab.start("server", "sh", "-c", "setsid sleep 60 & echo $!")
        stray = int(lab.wait(lambda: away.output, "the stray's pid"))
        away.wait()
        lab.wait(lambda: "setsid" not in Path(f"/proc/{stray}/cmdline").read_text(), "setsid")
        assert all(map(alive, (polite.pid, deaf.pid, child, stray)))

    assert polite.poll() == -signal.SIGTERM
    assert deaf.poll() == -signal.SIGKILL
    assert not any(map(alive, (polite.pid, deaf.pid, child, stray)))


@pytest.mark.net
def test_waiting_in_vain_tells_for_what_and_who_died() -> None:
    with Lab() as lab:
        lab.start("server", "sh", "-c", "echo no licence; exit 4").wait()
        with pytest.raises(LabTimeout) as late:
            lab.wait_listening("server", "tcp", 80, timeout=0.05)

    assert str(late.value).startswith("server listening at tcp/80: not within 0.05 s")
    assert "exit 4 has ended with status 4\n    no licence" in str(late.value)


@pytest.mark.net
def test_wait_returns_what_the_condition_found() -> None:
    answers = iter([None, 0, "", "found"])
    with Lab() as lab:
        assert lab.wait(lambda: next(answers), "an answer") == "found"


@pytest.mark.net
@pytest.mark.parametrize("host", ["client", "relay"])
def test_wait_listening_sees_sockets_of_that_host_only(host: str) -> None:
    with Lab() as lab, lab.enter(host), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("", 5353))
        lab.wait_listening(host, "udp", 5353)
        with pytest.raises(LabTimeout):
            lab.wait_listening("server", "udp", 5353, timeout=0.02)


@pytest.mark.net
def test_capture_sees_a_datagram_on_the_wire() -> None:
    send = "import socket; socket.socket(type=2).sendto(b'ping from here', ('192.168.0.1', 9))"
    with Lab() as lab:
        interface = lab.topology.interface("relay", towards="server").name
        with lab.capture("relay", interface) as packets:
            packets.settimeout(30)
            lab.run("client", "python3", "-c", send)
            # The first frames are ARP's.
            frames = iter(lambda: packets.recvfrom(2048), None)
            frame, where = next(f for f in frames if b"ping from here" in f[0])
        with pytest.raises(LabError, match="relay eth7: No such device"):
            lab.capture("relay", "eth7")

    assert frame[26:34] == socket.inet_aton("10.0.0.1") + socket.inet_aton("192.168.0.1")
    assert where[0] == interface
    assert where[2] == socket.PACKET_OUTGOING


@pytest.mark.net
def test_two_labs_work_side_by_side() -> None:
    with Lab() as one, Lab() as two:
        one.start("server", "python3", "-c", UDP_SERVER)
        one.wait_listening("server", "udp", 7)

        assert one.name != two.name
        assert one.directory != two.directory
        with pytest.raises(LabTimeout):
            two.wait_listening("server", "udp", 7, timeout=0.02)
        gone = two.name
        two.close()
        assert traces(gone) == []
        one.run("client", "true")


UDP_SERVER = "import socket; s = socket.socket(type=2); s.bind(('', 7)); s.recv(1)"


@pytest.mark.net
def test_a_name_can_be_had_once() -> None:
    with Lab(name="once") as lab:
        assert lab.namespace("client") == "once-client"
        with pytest.raises(LabError, match="there is a lab once already"), Lab(name="once"):
            pass
        lab.run("client", "true")
    assert traces("once") == []
    with pytest.raises(LabError, match="is not a lab's name"), Lab(name="../once"):
        pass


@pytest.mark.net
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_after_an_exception(error: type[BaseException]) -> None:
    lab = Lab()
    seen: list[Any] = []

    def fail() -> None:
        with lab:
            program = lab.start("client", "sleep", "60")
            seen.extend([lab.name, program.pid])
            assert len(traces(lab.name)) == len(DEFAULT.names) + 2
            raise error

    with pytest.raises(error):
        fail()

    name, pid = seen
    assert traces(name) == []
    assert not alive(pid)


OWNER = """
import signal, sys, threading
from krelay_vm import Lab
if "ignoring" in sys.argv:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Lab() as lab:
    program = lab.start("server", "sleep", "60")
    print(lab.name, program.pid, flush=True)
    sys.stdin.read()
"""


class Child:
    """A process with a lab of its own, that waits for its input to end."""

    def __init__(self, *arguments: str) -> None:
        self.process = subprocess.Popen(
            # Not as we are, perhaps under nohup(1), but as from a terminal.
            ["env", "--default-signal=HUP,INT", sys.executable, "-c", OWNER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        self.lab, self.program = words[0], int(words[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.communicate(timeout=20)


@pytest.mark.net
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_nothing_is_left_when_the_owner_is_asked_to_end(
    number: signal.Signals, status: int
) -> None:
    with Child() as child:
        child.process.send_signal(number)
        assert child.process.wait(10) == status

        assert traces(child.lab) == []
        assert not alive(child.program)


@pytest.mark.net
def test_a_signal_somebody_has_decided_about_stays_theirs() -> None:
    with Child("ignoring") as child:
        child.process.send_signal(signal.SIGHUP)
        child.process.communicate(timeout=10)

        assert child.process.returncode == 0
        assert traces(child.lab) == []


@pytest.mark.net
def test_a_killed_owners_programs_die_and_the_rest_is_removed_as_a_leftover() -> None:
    with Child() as child:
        assert child.lab not in leftovers()
        child.process.kill()
        child.process.wait(10)
        until(lambda: not alive(child.program))

        assert child.lab in leftovers()
        assert len(traces(child.lab)) == len(DEFAULT.names) + 2
        assert child.lab in remove_leftovers()
        assert traces(child.lab) == []


@pytest.mark.net
def test_a_program_whose_owner_is_gone_before_it_begins_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Seen on a busy machine: killed between fork and prctl, the owner leaves a child for ever.
    slow = tmp_path / "nsenter"
    begun = tmp_path / "begun"  # it knows its owner, who lives
    is_orphan = '[ "$(cut -d" " -f4 /proc/$$/stat)" != $PPID ]'
    wait = f"n=0; until {is_orphan} || [ $n = 1000 ]; do n=$((n + 1)); sleep 0.01; done"
    real = shutil.which("nsenter")
    slow.write_text(f'#!/bin/sh\n: >{begun}\n{wait}\nexec {real} "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    with Child() as child:
        assert alive(child.program)
        until(begun.exists)
        child.process.kill()
        child.process.wait(10)
        until(lambda: not alive(child.program))

        assert child.lab in remove_leftovers()


@pytest.mark.net
def test_handlers_are_as_before_when_the_lab_is_gone() -> None:
    ours = [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGTERM, signal.SIGHUP)]
    try:
        with Lab():
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL

        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, ours[0])
        signal.signal(signal.SIGHUP, ours[1])


@pytest.mark.net
def test_a_signal_during_the_removal_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab().__enter__()
    name, program = lab.name, lab.start("client", "sleep", "60")
    # The removal's first step is interrupted, as Ctrl-C would.
    monkeypatch.setattr(program, "terminate", lambda: signal.raise_signal(signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        lab.close()

    assert traces(name) == []
    assert not alive(program.pid)
