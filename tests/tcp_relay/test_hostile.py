"""Many peers, and such as mean no good: what they cost the relay, and that nobody else notices.

tcpproxy runs as a process between a server that is as rude as the client asks it to be
(programs/moody.py) and clients that are sockets of this process.  Figures are printed (pytest -s);
asserted is only what holds on a slow machine as well.  Whatever a test does to a proxy, when the
clients have gone the proxy has the descriptors and threads that it had before them.

KRELAY_LONG=1 lets the slow senders take their time.
"""

import errno
import os
import re
import resource
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Self

import pytest

from knet.endpoint import Endpoint
from tcp_relay.engine.session import End
from tests.net.programs import moody
from tests.net.programs.moody import DEAF, ECHO, FLOOD
from tests.tcp_relay.fake_krelay import FakeKrelay
from tests.tcp_relay.helpers import BOUND, LOCALHOST, TcpRelay, free_port, reset, wait_for

pytestmark = pytest.mark.slow

LONG = bool(os.environ.get("KRELAY_LONG"))

DESCRIPTORS = 20_500
"""That this process and the proxy would have; what the machine gives may be less."""
IDLE, LEAST_IDLE, ACTIVE = 10_000, 4_000, 100
IDLE_COST = 4096  # bytes, resident
ROUNDS, ROUND = 5, 0.15  # seconds

HOSTILE = 1000
BUFFER = 16 << 10
STALL = 2.0
LIMITS = ("--buffer", f"{BUFFER}", "--stall", f"{STALL}")
ROOM = 8 << 20
"""Bytes that a proxy may take for all else than what it holds."""

QUIET = 5.0  # seconds
TRICKLE = 30 if LONG else 4  # seconds
TRICKLE_CPU = 0.2  # of a core

RESETS, CLOSES = 2000, 5000
LEVEL = 2 << 20
"""Bytes that memory may differ by after the same thing has been done again."""

_PAGE = os.sysconf("SC_PAGE_SIZE")
_TICK = 1 / os.sysconf("SC_CLK_TCK")
_PATIENCE = 30.0
_ENDS = frozenset(map(str, End))


@pytest.fixture(autouse=True, scope="module")
def many_descriptors() -> Iterator[None]:
    """As many as may be, here and in the programs started from here."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(DESCRIPTORS, before[1]),) * 2)
    except ValueError:  # no CAP_SYS_RESOURCE
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


# Processes


class Process:
    """A program with its output in a file, for a `with` block; `port` is where it listens."""

    def __init__(self, output: Path, *arguments: str, port: int | None = None) -> None:
        self.port = port or 0
        self._output = output
        with output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *arguments], stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        self.pid = self.process.pid

    def __enter__(self) -> Self:
        with ExitStack() as on_failure:
            on_failure.push(self.__exit__)
            if self.port:
                wait_for(lambda: is_listening(self.port), f"{self.process.args!r}")
            on_failure.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait(BOUND)

    @property
    def output(self) -> str:
        """What it has said."""
        return self._output.read_text()


class Server(Process):
    """moody.py."""

    def __init__(self, directory: Path) -> None:
        port = free_port()
        super().__init__(directory / "server", moody.__file__, str(port), port=port)

    def ends(self, after: int = 0) -> Counter[str]:
        """How connections have ended as seen from there, but for the first ones."""
        return Counter(self.output.split()[after:])


class Proxy(Process):
    """tcpproxy."""

    def __init__(self, output: Path, server: Server, *options: str) -> None:
        port = free_port()
        where = ("--listen", LOCALHOST, LOCALHOST, str(server.port), str(port))
        quiet = ("-m", "tcp_relay.tcpproxy", "--log-level", "warning")
        super().__init__(output, *quiet, *options, *where, port=port)

    def descriptors(self) -> Counter[str]:
        """What it has open, by kind; none of them is a socket's number."""
        return descriptors(self.pid)

    def threads(self) -> int:
        """How many it has."""
        return self._status("Threads")

    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * _PAGE

    def most_memory(self) -> int:
        """Resident bytes, at most so far."""
        return self._status("VmHWM") * 1024

    def cpu(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK

    def totals(self) -> dict[str, int]:
        """The last line of the table that SIGUSR1 prints."""
        before = len(self._tables())
        self.process.send_signal(signal.SIGUSR1)
        wait_for(lambda: len(self._tables()) > before, "the table", _PATIENCE)
        found = re.findall(r"(\w+)=(\d+)", self._tables()[-1])
        return {name: int(count) for name, count in found}

    def balance(self) -> dict[str, int]:
        """The totals, when nobody is connected any more and every end is counted."""
        wait_for(lambda: self.totals()["open"] == 0, "the end of all connections", _PATIENCE)
        totals = self.totals()
        ended = sum(count for name, count in totals.items() if name in _ENDS)
        assert totals.get("accepted", 0) == ended + totals["open"], totals
        return totals

    def _tables(self) -> list[str]:
        return re.findall(r"^open=.*\n", self.output, re.MULTILINE)

    def _status(self, name: str) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        return int(status.partition(f"\n{name}:")[2].split()[0])


def descriptors(pid: int) -> Counter[str]:
    """What a process has open, by kind: socket, pipe ..."""
    kinds: Counter[str] = Counter()
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            kinds[os.readlink(entry.path).partition(":")[0]] += 1
    return kinds


def is_listening(port: int) -> bool:
    """Seen from outside: a trial connection would count as a client."""
    lines = Path("/proc/net/tcp").read_text().splitlines()
    return any(f":{port:04X} " in line and " 0A " in line for line in lines)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path) as server:
        yield server


@pytest.fixture
def proxies(tmp_path: Path, server: Server) -> Iterator[Callable[..., Proxy]]:
    """Starts proxies with these options; in the end each is as it was when it began."""
    with ExitStack() as held:
        started: list[tuple[Proxy, Counter[str], int]] = []

        def start(*options: str) -> Proxy:
            output = tmp_path / f"proxy-{len(started)}"
            proxy = held.enter_context(Proxy(output, server, *options))
            proxy.totals()  # whatever is imported late, is
            with dialled(proxy.port):  # it keeps a spare socket from the first client on
                wait_for(lambda: proxy.totals().get("accepted"), "the first client", _PATIENCE)
            proxy.balance()
            started.append((proxy, proxy.descriptors(), proxy.threads()))
            return proxy

        yield start
        for proxy, opened, threads in started:
            proxy.balance()
            assert (proxy.descriptors(), proxy.threads()) == (opened, threads)
            proxy.process.terminate()
            assert proxy.process.wait(BOUND) == 0
            assert "Traceback" not in proxy.output, proxy.output


# Clients


def dialled(port: int, mood: bytes = ECHO) -> socket.socket:
    """A client that has told its wish."""
    sock = socket.socket()
    try:
        sock.settimeout(_PATIENCE)
        moody.be_small(sock)
        # Nothing is to linger in TIME_WAIT: there are only so many ports for all these tests.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.connect((LOCALHOST, port))
        sock.sendall(mood)
    except BaseException:
        sock.close()
        raise
    return sock


@contextmanager
def crowd(port: int, count: int, mood: bytes = ECHO) -> Iterator[list[socket.socket]]:
    """So many clients; each is open from end to end, as the server has answered it."""
    with ExitStack() as held:
        sockets: list[socket.socket] = []
        for first in range(0, count, 200):
            some = [held.enter_context(dialled(port, mood)) for _ in range(min(200, count - first))]
            for sock in some:
                assert sock.recv(1) == mood
            sockets += some
        yield sockets


def round_trips(sockets: Sequence[socket.socket], seconds: float) -> float:
    """A second on all of them together, one at a time on each."""
    request = b"x" * 100
    by_number = {sock.fileno(): sock for sock in sockets}
    with select.epoll(len(sockets)) as poll:
        for sock in sockets:
            poll.register(sock, select.EPOLLIN)
            sock.sendall(request)
        count, waiting, began = 0, len(sockets), time.monotonic()
        while waiting:
            ready = poll.poll(_PATIENCE)
            assert ready, f"{waiting} wait for an answer"
            goes_on = time.monotonic() < began + seconds
            for number, _ in ready:
                assert by_number[number].recv(200) == request
                count += 1
                if goes_on:
                    by_number[number].sendall(request)
                else:
                    waiting -= 1
        return count / (time.monotonic() - began)


def how_they_end(sockets: Sequence[socket.socket], flood: bytes = b"") -> Counter[str]:
    """Waits for the end of all of them without ever reading, but sending, if asked to."""
    ends: Counter[str] = Counter()
    by_number = {sock.fileno(): sock for sock in sockets}
    with select.epoll(len(sockets)) as poll:
        for sock in sockets:
            sock.setblocking(False)
            # Edge-triggered: an end is told once, and so is room to send.
            poll.register(sock, select.EPOLLRDHUP | select.EPOLLOUT * bool(flood) | select.EPOLLET)
        deadline = time.monotonic() + _PATIENCE
        while by_number:
            ready = poll.poll(1.0)
            assert time.monotonic() < deadline, f"{len(by_number)} go on, ended: {ends}"
            for number, events in ready:
                sock = by_number[number]
                error = push(sock, flood) if events & select.EPOLLOUT else 0
                if events & ~select.EPOLLOUT or error:
                    error = error or sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                    ends[errno.errorcode.get(error, "end of file")] += 1
                    poll.unregister(sock)
                    del by_number[number]
    return ends


def push(sock: socket.socket, data: bytes) -> int:
    """Sends it over and over, until there is no more room; the error that has ended it, if any."""
    try:
        while data:
            sock.send(data)
    except BlockingIOError:
        pass
    except OSError as error:  # which this tells once
        return error.errno or 0
    return 0


@contextmanager
def bystanders(proxy: Proxy, count: int = 20, rounds: int = 50) -> Iterator[None]:
    """Ordinary clients that make their round trips meanwhile, at least so many."""
    over = threading.Event()
    worst = 0.0

    def converse(sockets: Sequence[socket.socket]) -> int:
        nonlocal worst
        done = 0
        while done < rounds or not over.is_set():
            for sock in sockets:
                began = time.monotonic()
                sock.sendall(b"still there?")
                assert sock.recv(100) == b"still there?"
                worst = max(worst, time.monotonic() - began)
            done += 1
            over.wait(0.01)
        return done

    with crowd(proxy.port, count) as sockets, ThreadPoolExecutor(1) as thread:
        talk = thread.submit(converse, sockets)
        try:
            yield
        finally:
            over.set()
        done = talk.result()
        tell(f"{count} bystanders: {done} round trips each, the longest {worst * 1000:.0f} ms")


def tell(text: str) -> None:
    """Figures, for pytest -s."""
    print(f"\n    {text}", end="")


# Many


@pytest.mark.serial
def test_thousands_of_idle_connections_need_little_memory_and_leave_the_active_ones_their_speed(
    proxies: Callable[..., Proxy],
) -> None:
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    idle = min(IDLE, (limit - 2 * ACTIVE) // 2 - 100)
    assert idle >= LEAST_IDLE, f"only {limit} files may be open here"
    if idle < IDLE:
        tell(f"{idle} instead of {IDLE} connections: {limit} files may be open here")
    busy, calm = proxies(), proxies()
    with crowd(busy.port, ACTIVE) as among, crowd(calm.port, ACTIVE) as alone:
        for sockets in (among, alone):
            round_trips(sockets, ROUND)
        before, pipes = busy.memory(), busy.descriptors()["pipe"]
        began = time.monotonic()
        with crowd(busy.port, idle) as sockets:
            tell(f"{idle} opened in {time.monotonic() - began:.1f} s")
            cost = (busy.memory() - before) / idle
            tell(f"resident memory of an idle connection: {cost:.0f} bytes")
            opened = busy.descriptors()
            rates = [(round_trips(among, ROUND), round_trips(alone, ROUND)) for _ in range(ROUNDS)]
            for sock in sockets:
                reset(sock)
    busy_rate, calm_rate = (median(each) for each in zip(*rates, strict=True))
    ratio = busy_rate / calm_rate
    tell(f"{ACTIVE} active: {busy_rate:.0f}/s among {idle}, {calm_rate:.0f}/s alone: {ratio:.2f}")
    assert opened["socket"] >= 2 * (idle + ACTIVE)
    assert opened["pipe"] == pipes
    assert cost < IDLE_COST
    assert ratio > 0.5


@pytest.mark.serial
def test_a_thousand_slow_senders_all_live_and_cost_little(proxies: Callable[..., Proxy]) -> None:
    proxy = proxies(*LIMITS)
    with crowd(proxy.port, HOSTILE) as sockets, select.epoll(HOSTILE) as poll:
        got = {sock.fileno(): bytearray() for sock in sockets}
        by_number = {sock.fileno(): sock for sock in sockets}
        for sock in sockets:
            poll.register(sock, select.EPOLLIN)

        def take(timeout: float) -> None:
            for number, _ in poll.poll(timeout):
                data = by_number[number].recv(100)
                assert data, "a slow sender was hung up on"
                got[number] += data

        used, began, sent = proxy.cpu(), time.monotonic(), 0
        while sent < TRICKLE * HOSTILE:
            due = int((time.monotonic() - began) * HOSTILE)
            for number in range(sent, min(due, TRICKLE * HOSTILE)):
                sockets[number % HOSTILE].sendall(b"%c" % (number // HOSTILE))
                sent = number + 1
            take(0.005)
        share = (proxy.cpu() - used) / (time.monotonic() - began)
        deadline = time.monotonic() + _PATIENCE
        while sum(map(len, got.values())) < sent and time.monotonic() < deadline:
            take(0.1)
        tell(f"{HOSTILE} senders of a byte a second, echoed, {TRICKLE} s: {share:.1%} of a core")
        assert proxy.totals()["open"] == HOSTILE
        assert all(received == bytes(range(TRICKLE)) for received in got.values())
    assert share < TRICKLE_CPU


# Idle


@pytest.fixture
def strace() -> str:
    found = shutil.which("strace")
    if found is None:
        pytest.skip("strace isn't installed")
    if Path("/proc/sys/kernel/yama/ptrace_scope").exists() and os.geteuid() != 0:
        scope = Path("/proc/sys/kernel/yama/ptrace_scope").read_text().strip()
        if scope not in "0":
            pytest.skip(f"strace may not attach here: kernel.yama.ptrace_scope={scope}")
    return found


def system_calls(strace: str, pid: int, directory: Path) -> Counter[str]:
    """What a process, with all its threads, calls within a while, by name.

    Attaching breaks off the call that sleeps; it is called again, which is no doing of the process.
    """
    calls, said = directory / "calls", directory / "strace"
    with said.open("wb") as out:
        tracer = subprocess.Popen(
            [strace, "-f", "-o", str(calls), "-p", str(pid)], stdout=out, stderr=out
        )
    try:
        wait_for(lambda: "attached" in said.read_text() or tracer.poll() is not None, "strace")
        assert tracer.poll() is None, said.read_text()
        with pytest.raises(subprocess.TimeoutExpired):
            tracer.wait(QUIET)
    finally:
        tracer.send_signal(signal.SIGINT)  # it detaches
        tracer.wait(BOUND)
    names = re.findall(r"^\d+ +(\w+)\(", calls.read_text(), re.MULTILINE)
    assert names, "strace saw nothing, not even what it broke off"
    tell(f"system calls in {QUIET:g} s, with the one that strace broke off: {dict(Counter(names))}")
    return Counter(names)


def wait_for_rest(server: Server) -> None:
    """Until every connection to the server has been probed, and is so no more."""

    def resting() -> set[bool]:
        words = ("ss", "-tnoH", "state", "established", "dst", f"{LOCALHOST}:{server.port}")
        shown = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        return {bool(re.search(r"keepalive,\d+min", line)) for line in shown.splitlines()}

    wait_for(lambda: False in resting(), "probes", 60.0, pause=0.1)
    wait_for(lambda: resting() == {True}, "rest", 60.0, pause=0.1)


def test_an_idle_proxy_makes_no_system_call(
    proxies: Callable[..., Proxy], server: Server, strace: str, tmp_path: Path
) -> None:
    proxy = proxies("--stall", "4")
    with crowd(proxy.port, HOSTILE):
        wait_for_rest(server)
        calls = system_calls(strace, proxy.pid, tmp_path)
    assert set(calls) <= {"epoll_wait", "restart_syscall"}
    assert calls.total() <= 2


def test_an_idle_tcp_relay_only_looks_up_once_a_second(
    server: Server, strace: str, tmp_path: Path
) -> None:
    endpoint = Endpoint.of(LOCALHOST, server.port)
    with TcpRelay(tmp_path / "tree", "--log-level", "warning", "--stall", "4") as relay:
        wait_for(lambda: is_listening(relay.gport), "tcp-relay")
        with FakeKrelay(relay.root, endpoint) as krelay, crowd(relay.gport, HOSTILE):
            wait_for(
                lambda: krelay.reports and krelay.reports[-1].counts["opened"] == HOSTILE,
                "the report of all of them",
            )
            wait_for_rest(server)
            calls = system_calls(strace, relay.process.pid, tmp_path)
        assert set(calls) <= {"epoll_wait", "restart_syscall"}
        assert calls.total() <= QUIET + 3
        assert relay.end() == 0


# Hostile


@pytest.mark.serial
def test_a_thousand_clients_that_never_read_are_bounded_and_ended(
    proxies: Callable[..., Proxy], server: Server
) -> None:
    proxy = proxies(*LIMITS)
    before, ended = proxy.memory(), server.ends().total()
    with bystanders(proxy):
        began = time.monotonic()
        with crowd(proxy.port, HOSTILE, FLOOD) as sockets:
            ends = how_they_end(sockets)
        took = time.monotonic() - began
    check_bounded(proxy, before, took, ends)
    wait_for(lambda: server.ends(ended)["reset"] >= HOSTILE, f"resets: {server.ends(ended)}")


@pytest.mark.serial
def test_a_thousand_servers_that_never_read_are_bounded_and_ended(
    proxies: Callable[..., Proxy], server: Server
) -> None:
    proxy = proxies(*LIMITS)
    before, ended = proxy.memory(), server.ends().total()
    with bystanders(proxy):
        began = time.monotonic()
        with crowd(proxy.port, HOSTILE, DEAF) as sockets:
            ends = how_they_end(sockets, bytes(1 << 16))
        took = time.monotonic() - began
    check_bounded(proxy, before, took, ends)
    wait_for(lambda: server.ends(ended)["reset"] >= HOSTILE, f"resets: {server.ends(ended)}")


def check_bounded(proxy: Proxy, before: int, seconds: float, ends: Counter[str]) -> None:
    grown = proxy.most_memory() - before
    tell(
        f"{HOSTILE} peers that never read: {grown / 1e6:.1f} MB more at most (of "
        f"{HOSTILE * BUFFER / 1e6:.1f} MB for what is held), all ended after {seconds:.1f} s"
    )
    assert ends == {"ECONNRESET": HOSTILE}
    assert proxy.totals()["stalled"] == HOSTILE
    assert grown < HOSTILE * BUFFER + ROOM
    assert grown > HOSTILE * BUFFER / 8, "they didn't fill what they could"


@pytest.mark.serial
def test_a_server_that_is_stopped_hangs_nobody_for_longer_than_the_limit(
    proxies: Callable[..., Proxy], server: Server
) -> None:
    proxy = proxies(*LIMITS)
    with crowd(proxy.port, 100) as sockets, crowd(proxy.port, 20) as idle:
        server.process.send_signal(signal.SIGSTOP)
        try:
            began = time.monotonic()
            ends = how_they_end(sockets, bytes(1 << 16))
            tell(f"100 that send to a stopped server: ended after {time.monotonic() - began:.1f} s")
            assert ends == {"ECONNRESET": 100}
            assert proxy.totals()["stalled"] == 100
        finally:
            server.process.send_signal(signal.SIGCONT)
        assert round_trips(idle, 0.1) > 0  # who sent nothing is still served, and so is who comes
        with crowd(proxy.port, 20) as late:
            assert round_trips(late, 0.1) > 0


CLIENT = """
import socket, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as sock:
    sock.sendall(b"f")
    while len(sock.recv(65536)):
        print("alive", flush=True)
"""


def test_a_client_that_is_stopped_is_ended_and_hinders_nobody(
    proxies: Callable[..., Proxy], server: Server, tmp_path: Path
) -> None:
    proxy = proxies(*LIMITS)
    with bystanders(proxy), Process(tmp_path / "client", "-c", CLIENT, str(proxy.port)) as client:
        wait_for(lambda: client.output.count("alive") > 10, "a client that receives")
        client.process.send_signal(signal.SIGSTOP)
        ended = server.ends()["reset"]
        wait_for(lambda: server.ends()["reset"] > ended, "the reset at the server")
        assert proxy.totals()["stalled"] == 1
        client.process.send_signal(signal.SIGCONT)
        assert client.process.wait(BOUND) == 1
        assert "ConnectionResetError" in client.output


def test_clients_that_reset_at_once_leave_nothing(proxies: Callable[..., Proxy]) -> None:
    proxy = proxies()

    def come_and_go() -> None:
        for _ in range(RESETS):
            with socket.create_connection((LOCALHOST, proxy.port), _PATIENCE) as sock:
                reset(sock)

    check_level(proxy, come_and_go, RESETS)


def test_connections_without_a_byte_leave_nothing(proxies: Callable[..., Proxy]) -> None:
    proxy = proxies()

    def come_and_go() -> None:
        for _ in range(CLOSES // 2):
            socket.create_connection((LOCALHOST, proxy.port), _PATIENCE).close()

    check_level(proxy, come_and_go, CLOSES // 2)
    assert proxy.totals()["closed"] == CLOSES


def check_level(proxy: Proxy, come_and_go: Callable[[], None], count: int) -> None:
    """Done twice, it takes no more memory than done once; and all of them are accounted for."""
    opened = proxy.descriptors()
    accepted = proxy.totals()["accepted"]
    levels = []
    for turn in (1, 2):
        began = time.monotonic()
        come_and_go()
        totals = proxy.balance()
        assert totals["accepted"] == accepted + turn * count
        levels.append(proxy.memory())
        tell(f"{count} in {time.monotonic() - began:.1f} s: {totals}, {levels[-1] / 1e6:.1f} MB")
    assert levels[1] - levels[0] < LEVEL
    assert proxy.descriptors() == opened
