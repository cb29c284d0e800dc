"""The tester of proxies is tested by proxies with a fault: each must fail where its fault shows.

All of them run under testers of their own, some at a time, because most of it is waiting.
"""

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from knet.children import compiled_as_here
from tests.net.programs.server import blob
from tests.tprox.ends import End, Ending, Failure, Text
from tests.tprox.field import Field, Ground
from tests.tprox.plan import PHASES, groups, parse, select
from tests.tprox.runner import run
from tests.tprox.scripts import SCRIPTS

STALL = 3
"""Seconds: the limit of the proxies under test, for the phases that wait to be short."""
AT_A_TIME = 5
PYTHON = (sys.executable, *compiled_as_here())
TPROX = (*PYTHON, "-m", "tests.tprox", "--stall", str(STALL))

SINGLE, TWO, TWENTY, BULK, MIX, ONE_WAY, EARLY, ACTIVE, FORWARD, REVERSE = (
    phase.name for phase in PHASES
)
SOCAT = ("socat", "TCP-LISTEN:{listen},fork,reuseaddr", "TCP:{host}:{port}")
TCPPROXY = (*PYTHON, "-m", "tcp_relay.tcpproxy", "--stall", str(STALL))

FAILS: dict[str, set[str]] = {
    "tcpproxy": set(),
    "sound": set(),
    "unbounded": {MIX, EARLY, ACTIVE, FORWARD, REVERSE},
    "no_half_close": {BULK, ONE_WAY},
    "blocks_on_one": {MIX, EARLY, FORWARD, REVERSE},  # nor does it know RST, or any limit
    "idle_timeout": {ACTIVE},
    "absolute_limit": {ACTIVE},
    "loses_tail": {EARLY},
    "fin_for_rst": {EARLY},
    # It ends 0.5 s after the first end of file, knows no RST, and would wait for ever.
    "socat": {ONE_WAY, EARLY, FORWARD, REVERSE},
}
MAY_FAIL: dict[str, set[str]] = {
    # Where the reader is as fast as the sender, it is chance whether the end comes with the tail.
    "loses_tail": {BULK, ACTIVE, ONE_WAY},
    # On a busy machine these take longer than the limit, and it cuts them too.
    "absolute_limit": {BULK, MIX, ONE_WAY, EARLY},
    # While the lazy ones block it, all others wait for as long as they are given.
    "blocks_on_one": {ACTIVE},
    # On a busy machine a direction may be silent for 0.5 s when the other has ended.
    "socat": {BULK},
}


def command(proxy: str) -> tuple[str, ...]:
    """How this proxy is started."""
    special = {"socat": SOCAT, "tcpproxy": TCPPROXY}
    return special.get(proxy, (*PYTHON, "-m", f"tests.tprox.broken.{proxy}", str(STALL)))


def tprox(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the tester."""
    return subprocess.run((*TPROX, *arguments), capture_output=True, text=True, timeout=280)


Runs = dict[str, "Future[subprocess.CompletedProcess[str]]"]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest) -> Iterator[Runs]:
    """The tester's run against each proxy that this session wants."""
    wanted = {
        item.callspec.params["proxy"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.path == request.path
        and hasattr(item, "callspec")
        and "proxy" in item.callspec.params
    }
    with ThreadPoolExecutor(AT_A_TIME) as threads:
        yield {proxy: threads.submit(tprox, *command(proxy)) for proxy in FAILS if proxy in wanted}


@pytest.mark.slow
@pytest.mark.parametrize("proxy", FAILS)
def test_a_proxy_fails_where_its_fault_shows_and_nowhere_else(proxy: str, runs: Runs) -> None:
    if proxy == "socat" and not shutil.which("socat"):
        pytest.skip("socat is not installed")
    done = runs[proxy].result()
    lines = done.stdout.splitlines()

    assert [line.partition(" ... ")[0] for line in lines] == [p.name for p in PHASES], done.stderr
    failed = {line.partition(" ... ")[0] for line in lines if " ... failed: " in line}
    assert failed - MAY_FAIL.get(proxy, set()) == FAILS[proxy], done.stdout
    assert done.returncode == bool(failed)
    assert done.stderr == ""


# What is demanded of a proxy is what TCP gives


@pytest.mark.slow
def test_a_direct_connection_passes_all_but_the_time_outs() -> None:
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    connect = partial(socket.create_connection, listener.getsockname())
    with Field(Ground(lambda: listener, connect, connect)) as field:
        verdicts = list(run(field, PHASES[:8], stall=1))

    assert [str(verdict) for verdict in verdicts if verdict.failure] == []
    assert len(verdicts) == 8


# The program


def test_its_list_is_the_phases_in_order() -> None:
    done = tprox("--list")

    assert done.stdout.splitlines() == list(SCRIPTS)
    assert done.returncode == 0


@pytest.mark.parametrize("wrong", [[], ["--only", "x", "cat"], ["--stall", "0", "cat"], ["--x"]])
def test_a_wrong_command_line_ends_with_status_2(
    wrong: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(wrong)
    assert ended.value.code == 2
    assert "usage: " in capsys.readouterr().err


def test_options_behind_the_command_are_the_commands() -> None:
    options = parse(["--only", "bulk", "--stall", "2", "proxy", "--stall", "3", "--list"])

    assert options.command == ["proxy", "--stall", "3", "--list"]
    assert (options.stall, [phase.name for phase in options.phases]) == (2, [BULK])


def test_just_the_phases_that_wait_run_at_the_same_time() -> None:
    assert [len(group) for group in groups(PHASES)] == [1] * 7 + [3]
    assert [group[0].name for group in groups(select("timeout"))] == [FORWARD]


def test_a_proxy_that_can_not_start_is_told_with_its_last_words() -> None:
    done = tprox("sh", "-c", "echo no such host >&2; exit 3")

    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "the proxy has ended with status 3; it said: no such host\n"


def test_a_proxy_that_dies_fails_the_phase_with_its_last_words() -> None:
    dies = (
        "import sys, threading; from tests.tprox.broken import sound\n"
        "def die(*_): print('my last words'); sys.stdout.flush(); import os; os._exit(7)\n"
        "sound.main(die)"
    )
    done = tprox("--only", "single", *PYTHON, "-c", dies, str(STALL))

    assert done.stdout == (
        f"{SINGLE} ... failed: the proxy has ended with status 7; it said: my last words\n"
    )
    assert done.returncode == 1


@pytest.mark.slow
def test_a_proxy_that_connects_nobody_fails_with_that_reason() -> None:
    deaf = (
        "import signal, socket, sys\n"
        "with socket.create_server(('127.0.0.1', int(sys.argv[3]))): signal.pause()"
    )
    done = tprox("--only", "single", *PYTHON, "-c", deaf)

    assert done.stdout == (
        f"{SINGLE} ... failed: connection 1: did not reach the server within 5 s\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_tester_that_is_ended_ends_its_proxies(number: signal.Signals, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    noted = ("sh", "-c", f'echo $$ >> {pids}; exec "$0" "$@"', *command("sound"))
    with subprocess.Popen(
        (*TPROX, *noted), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as tester:
        assert tester.stdout
        assert tester.stdout.readline().startswith(SINGLE)
        tester.send_signal(number)
        _, errors = tester.communicate(timeout=30)

    assert tester.returncode == 128 + number
    assert errors == ""
    found = [int(pid) for pid in pids.read_text().split()]
    assert len(found) == 2
    assert [pid for pid in found if Path(f"/proc/{pid}").exists()] == []


# An end, and what it says


Ends = tuple[End, End]


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Two ends of a connection with nothing between; the first has little patience."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as client,
    ):
        server, _ = listener.accept()
        with server:
            now = time.monotonic()
            yield (End(client, "client", 0.2, now + 0.2), End(server, "server", 10, now + 10))


def test_what_does_not_come_is_told_in_numbers(ends: Ends) -> None:
    client, server = ends
    server.send_text(1, 1000)

    with pytest.raises(Failure, match=r"^client: 1,000 of 2,000 bytes came within 0.2 s$"):
        client.receive_text(1, 2000)


def test_what_is_not_taken_is_told_in_numbers(ends: Ends) -> None:
    client, _ = ends

    with pytest.raises(Failure, match=r"^client: [\d,]+ of 99,000,000 bytes were taken within"):
        client.send_text(1, 99_000_000)


def test_an_end_that_comes_too_soon_is_told_in_numbers(ends: Ends) -> None:
    client, server = ends
    server.send_text(1, 1000)
    server.close()

    with pytest.raises(Failure, match=r"^client: end of file when 1,000 of 2,000 bytes came$"):
        client.receive_text(1, 2000)


def test_bytes_behind_the_last_are_told(ends: Ends) -> None:
    client, server = ends
    server.send_text(1, 1001)

    with pytest.raises(Failure, match="more than the 1,000 bytes that were sent"):
        client.receive_text(1, 1000)


def over_reading(end: End) -> Ending:
    """How it ended, for an end that reads."""
    return end.receive_rest(Text(0, 0))


@pytest.mark.parametrize("look", [over_reading, End.over])
@pytest.mark.parametrize(("leave", "seen"), [(End.reset, Ending.RST), (End.close, Ending.FIN)])
def test_a_reset_and_an_end_of_file_are_told_apart(
    ends: Ends, look: Callable[[End], Ending], leave: Callable[[End], None], seen: Ending
) -> None:
    client, server = ends
    leave(client)

    assert look(server) is seen


def test_a_flood_tells_a_reset_from_one_behind_an_end_of_file(ends: Ends) -> None:
    client, server = ends
    client.close()
    assert server.over() is Ending.FIN

    assert server.flood(1) is Ending.FIN


def test_a_flood_is_stuck_when_nothing_is_taken(ends: Ends) -> None:
    _, server = ends

    assert server.flood(1, still=0.1) is None
    assert server.sent > 0


@pytest.mark.parametrize("cut", [1, 7, 65536, 100_000])
def test_a_text_is_known_however_it_is_cut(cut: int) -> None:
    whole = b"".join(blob(5, 200_000)) if cut > 1 else b"".join(blob(5, 1000))
    text = Text(5, len(whole))

    for at in range(0, len(whole), cut):
        assert text.feed(whole[at : at + cut]) is None
    assert text.got == len(whole)


def test_a_text_tells_the_first_byte_that_differs() -> None:
    wrong = bytearray(b"".join(blob(5, 200_000)))
    wrong[123_456] ^= 1
    text = Text(5, 200_000)

    assert text.feed(bytes(wrong[:100_000])) is None
    assert text.feed(bytes(wrong[100_000:])) == "byte 123,456 is not what was sent"
