"""A soak: mixed traffic for as long as is wished, and what krelay and tcp-relay hold meanwhile.

    python -m tests.net.soak MINUTES [queue|auto]      as root; a line a minute, then the quarters

All timeouts are a quarter of what they are by default, so that whatever is to go has often gone.
There are pages, bulk in both directions, forwarded TCP, queries, datagrams, requests and traces
at the control socket, and settings that change.  In the first and in the third quarter tcp-relay is
killed, or ended and started again, every now and then.  So in the second and the fourth it grows
equally old, and whatever grows from the one to the other grows for ever.

Nothing may fail but what goes through tcp-relay while that is away.
"""

import os
import re
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, cycle
from pathlib import Path
from random import Random
from typing import NamedTuple

from krelay_vm import Program
from procfs_sim import DEFAULTS
from tests.net.programs import server
from tests.net.world import GPORT, World, control_socket, echo, greet

QUARTERS = 4
RESTARTS = (0, 2)
"""The quarters in which tcp-relay is restarted."""
RESTART_EVERY = 90.0
"""Seconds."""
SAMPLE_EVERY = 5.0
WARM_UP = 0.5
"""Of each quarter, counted from its end, that part is looked at: what the one before has left has
gone by then."""
AFTER_RESTART = 3.0
"""Seconds after tcp-relay is back in which its former clients still find out."""
SERVICES = "tcp/80 tcp/443=forward udp/7 udp/53"
TIMEOUTS = {
    "timeouts__udp": DEFAULTS.timeouts_udp // 4,
    "timeouts__udp_dns": DEFAULTS.timeouts_udp_dns // 4,
    "timeouts__tcp_transitory": DEFAULTS.timeouts_tcp_transitory // 4,
    "timeouts__tcp_established": DEFAULTS.timeouts_tcp_established // 4,
}
OPTIONS = ("--stall", "2.5", "--half-close", "900", "--connect", "2.5", "--drain", "7.5")
CHANGES: tuple[dict[str, object], ...] = (
    {"gport": GPORT + 1}, {"limits__flows": 60_000}, {"source": "relay"}, {"gport": GPORT},
    {"timeouts__udp": 70}, {"source": "client"}, {"limits__refusal": "drop"},
    {"limits__flows": 65_536}, {"timeouts__udp": 75}, {"limits__refusal": "reset"},
    {"services": f"{SERVICES} udp/99"}, {"services": SERVICES},
)  # fmt: skip
REQUESTS = (
    "show nat", "show status", "show nat json proto=tcp", "show counters json", "show config",
    "show nat state=established", "help", "show nat service=udp/53",
)  # fmt: skip
MB = 1 << 20
TOLERANCE = {
    "krelay_kb": (400, 0.02), "tcp_relay_kb": (400, 0.02),
    "krelay_files": (2, 0.0), "tcp_relay_files": (6, 0.0),
    "flows": (50, 0.1), "elements": (50, 0.1),
}  # fmt: skip
"""By how much, and by what part of itself, the median of a figure may be higher in the last quarter
than in the second: what the machine makes of such traffic, being busier or less so."""


class Sample(NamedTuple):
    """How things are at a time."""

    at: float
    krelay_kb: float
    """Private_Dirty of its memory (proc_pid_smaps(5))."""
    tcp_relay_kb: float
    krelay_files: float
    tcp_relay_files: float
    flows: float
    elements: float
    """Of the kernel's maps."""


@dataclass
class Soak:
    """What has happened."""

    samples: list[Sample] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    """Conversations that went well, by kind."""
    errors: list[str] = field(default_factory=list)
    planned: Counter[str] = field(default_factory=Counter)
    """Those that failed while tcp-relay was away, which is as it should be."""
    restarts: int = 0
    seconds: float = 0.0

    def quarter(self, number: int) -> Mapping[str, float]:
        """The median of each figure in the later part of this quarter."""
        length = self.seconds / QUARTERS
        end = (number + 1) * length
        some = [each for each in self.samples if end - WARM_UP * length <= each.at <= end]
        return {name: statistics.median(getattr(each, name) for each in some) for name in TOLERANCE}

    def grown(self) -> list[str]:
        """What is higher in the last quarter than in the second, beyond its tolerance."""
        then, now = self.quarter(1), self.quarter(QUARTERS - 1)
        allowed = {name: some + part * then[name] for name, (some, part) in TOLERANCE.items()}
        return [
            f"{name}: {then[name]:g} -> {now[name]:g}, may grow by {allowed[name]:g}"
            for name in TOLERANCE
            if now[name] > then[name] + allowed[name]
        ]


def run(
    world: World,
    seconds: float,
    say: Callable[[str], object] = print,
    restart_every: float = RESTART_EVERY,
) -> Soak:
    """Soaks a world in which nothing runs yet."""
    for host in ("server", "server2"):
        world.serve(host, "tcp/80", "tcp/443", "udp/7", "udp/53", "udp/99")
    world.begin(services=SERVICES)
    world.put(None, **TIMEOUTS)
    world.tcp_relay_process.terminate()
    world.tcp_relay_process.wait()
    world.start_tcp_relay(*OPTIONS)
    return _Run(world, seconds, say, restart_every).run()


class _Run:
    def __init__(
        self, world: World, seconds: float, say: Callable[[str], object], restart_every: float
    ) -> None:
        self.world = world
        self.restart_every = restart_every
        self.say = say
        self.soak = Soak(seconds=seconds)
        self.began = time.monotonic()
        self.over = threading.Event()
        self.away_since = [(0.0, 0.0)]
        """When tcp-relay went, and when all was well again: of each restart."""
        self._lock = threading.Lock()

    @property
    def at(self) -> float:
        return time.monotonic() - self.began

    def run(self) -> Soak:
        actors = [
            *[("page", self.page, 0.05)] * 2,
            *[("bulk", self.bulk, 0.2)] * 2,
            ("held", self.held, 0.5),
            ("forwarded", self.forwarded, 0.1),
            ("forwarded bulk", self.forwarded_bulk, 0.5),
            *[("question", self.query, 0.02)] * 2,
            ("datagrams", self.datagrams, 0.1),
            ("control", self.control, 1.0),
            ("trace", self.trace, 20.0),
            ("change", self.change, 10.0),
        ]
        threads = [
            threading.Thread(target=self._act, args=(*actor, Random(number)), daemon=True)
            for number, actor in enumerate(actors)
        ]
        for thread in threads:
            thread.start()
        try:
            self._watch()
        finally:
            self.over.set()
        for thread in threads:
            thread.join(60)
        stuck = [t for t in threads if t.is_alive()]
        self.soak.errors += [f"{len(stuck)} conversations never ended"] if stuck else []
        self._read_logs()
        return self.soak

    def _act(self, kind: str, deed: Callable[[Random], object], pause: float, rng: Random) -> None:
        due = self.at
        while True:  # as often, however long a deed takes: a quieter machine has no more flows
            due = max(self.at, due + pause * rng.uniform(0.5, 1.5))
            if self.over.wait(due - self.at):
                return
            began = self.at
            try:
                deed(rng)
            except Exception as error:
                self._failed(kind, began, error)
            else:
                with self._lock:
                    self.soak.done[kind] += 1

    def _failed(self, kind: str, began: float, error: Exception) -> None:
        at = self.at
        planned = kind in ("page", "bulk", "held") and any(
            began <= back + AFTER_RESTART and at >= went for went, back in list(self.away_since)
        )
        with self._lock:
            if planned:
                self.soak.planned[kind] += 1
            else:
                self.soak.errors.append(f"{at:.1f} s: {kind}: {error!r}")

    # What is done

    @contextmanager
    def _socket(
        self, host: str, kind: socket.SocketKind = socket.SOCK_STREAM
    ) -> Iterator[socket.socket]:
        with self.world.lab.enter(host):
            sock = socket.socket(socket.AF_INET, kind)
        with sock:
            sock.settimeout(20)
            yield sock

    @contextmanager
    def _connected(self, host: str, port: int) -> Iterator[socket.socket]:
        with self._socket(host) as sock:
            sock.connect((self.world.relay, port))
            yield sock

    def page(self, rng: Random) -> None:
        """A short connection; one in ten ends by a reset."""
        with self._connected(rng.choice(("client", "client2")), 80) as sock:
            greet(sock)
            echo(sock, rng.randbytes(rng.choice((1, 100, 5000))))
            if rng.random() < 0.1:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    def bulk(self, rng: Random) -> None:
        """Much in both directions at once."""
        with self._connected("client", 80) as sock:
            _both(sock, rng.randrange(1000), rng.choice((100_000, 2 * MB)))

    def held(self, rng: Random) -> None:
        """A connection that rests between what it says."""
        with self._connected("client2", 80) as sock:
            greet(sock)
            for _ in range(rng.randrange(2, 10)):
                if self.over.wait(rng.uniform(0.5, 3)):
                    return
                echo(sock, rng.randbytes(200))

    def forwarded(self, rng: Random) -> None:
        """A short connection that is forwarded."""
        with self._connected(rng.choice(("client", "client2")), 443) as sock:
            greet(sock)
            echo(sock, rng.randbytes(1000))

    def forwarded_bulk(self, rng: Random) -> None:
        """Much over one."""
        with self._connected("client2", 443) as sock:
            _both(sock, rng.randrange(1000), MB)

    def query(self, rng: Random) -> None:
        """A query, from a port of its own, asked up to three times."""
        with self._socket("client", socket.SOCK_DGRAM) as sock:
            self._exchange(sock, rng.randbytes(12), 53)

    def datagrams(self, rng: Random) -> None:
        """Some exchanges from one port; now and then somebody doesn't wait for the answer."""
        with self._socket("client2", socket.SOCK_DGRAM) as sock:
            for _ in range(rng.choice((1, 5, 50))):
                self._exchange(sock, rng.randbytes(rng.choice((20, 1200))), 7)
            sock.sendto(b"and nothing more", (self.world.relay, 7))

    def _exchange(self, sock: socket.socket, data: bytes, port: int) -> None:
        sock.settimeout(2)
        for _ in range(3):
            sock.sendto(data, (self.world.relay, port))
            with suppress(TimeoutError):
                while sock.recv(2000) != data:
                    pass
                return
            with self._lock:
                self.soak.done["asked again"] += 1
        raise TimeoutError(f"no answer from port {port}")

    def control(self, rng: Random) -> None:
        """A query to krelay."""
        answer = self.world.ask(rng.choice(REQUESTS))
        assert not any(line.startswith("error:") for line in answer), answer

    def trace(self, rng: Random) -> None:
        """A trace, or a capture, for some seconds."""
        request = rng.choice(("trace", "trace pcap", "trace proto=udp", "trace service=tcp/80"))
        with control_socket(self.world.root) as connection:
            connection.sendall(request.encode() + b"\n")
            end, seen = time.monotonic() + rng.uniform(1, 6), 0
            try:
                while time.monotonic() < end:
                    seen += len(connection.recv(1 << 16))
            except TimeoutError:
                assert self.over.is_set()  # nothing comes any more
            assert seen or self.over.is_set()

    _changes = cycle(CHANGES)

    def change(self, _: Random) -> None:
        """Another value for a setting."""
        self.world.put(None, **next(self._changes))

    # What is seen meanwhile

    def _watch(self) -> None:
        restart_at, kinds = self.restart_every / 2, cycle(("KILL", "TERM"))
        seconds = self.soak.seconds
        for number in count(1):
            if self.over.wait(max(0.0, number * SAMPLE_EVERY - self.at)) or self.at >= seconds:
                return
            quarter = int(self.at * QUARTERS / seconds)
            self.soak.samples.append(self._sample())
            if number % round(60 / SAMPLE_EVERY) == 0:
                self.say(self._line(quarter))
            if self.at >= restart_at:
                restart_at += self.restart_every
                if quarter in RESTARTS:
                    self._restart(next(kinds))

    def _restart(self, how: str) -> None:
        world = self.world
        went = self.at
        self.away_since.append((went, float("inf")))
        if how == "KILL":
            world.kill(world.tcp_relay_process)
        else:
            world.tcp_relay_process.terminate()
            world.tcp_relay_process.wait(30)
        world.start_tcp_relay(*OPTIONS)
        world.until(self._serves, "tcp-relay serves again", 30)
        self.away_since[-1] = (went, self.at)
        self.soak.restarts += 1

    def _serves(self) -> bool:
        with suppress(OSError, AssertionError), self._connected("client", 80) as sock:
            return bool(greet(sock))
        return False

    def _sample(self) -> Sample:
        krelay, relay = self.world.krelay_process, self.world.tcp_relay_process
        return Sample(
            self.at,
            private_dirty(krelay),
            private_dirty(relay),
            files(krelay),
            files(relay),
            self.world.values("status")["flows"],
            self.world.handed(),
        )

    def _line(self, quarter: int) -> str:
        figures = " ".join(
            f"{name}={value:g}" for name, value in self.soak.samples[-1]._asdict().items()
        )
        with self._lock:
            done = sum(self.soak.done.values())
            return f"quarter={quarter + 1} {figures} done={done} errors={len(self.soak.errors)}"

    def _read_logs(self) -> None:
        ours = [each for each in self.world.lab.programs if {"krelay", "tcp_relay"} & {*each.argv}]
        assert len(ours) == 3 + self.soak.restarts
        for program in ours:
            lines = [line for line in program.output.splitlines() if _BAD.search(line)]
            self.soak.errors += [f"{program}: {line}" for line in lines[:5]]


_BAD = re.compile("Traceback|circles collected|Z error ")
"""What no log may have."""


def private_dirty(program: Program) -> int:
    """KB of memory that it alone has, and has written to; its children's with it."""
    found = 0
    for pid in (program.pid, *_children(program.pid)):
        with suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            found += int(re.findall(r"^Private_Dirty:\s+(\d+)", text, re.MULTILINE)[0])
    return found


def files(program: Program) -> int:
    """How many files and sockets it has open."""
    return len(os.listdir(f"/proc/{program.pid}/fd"))


def _children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def _both(sock: socket.socket, seed: int, size: int) -> None:
    sock.sendall(f"both {seed} {size}\n".encode())
    sending = threading.Thread(target=_send, args=(sock, seed, size))
    sending.start()
    with sock.makefile("rb") as answer:
        got = answer.read()
    sending.join()
    expected = b"".join(server.blob(seed, size)) + f"{size} {server.digest(seed, size)}\n".encode()
    assert got == expected, f"{len(got)} of {len(expected)} bytes"


def _send(sock: socket.socket, seed: int, size: int) -> None:
    with suppress(OSError):  # whoever receives finds it out
        server.send_blob(sock, seed, size)
        sock.shutdown(socket.SHUT_WR)


def main(minutes: float, datapath: str) -> int:
    """Soaks; 1 if something failed or has grown."""
    with World(datapath=datapath) as world:
        soak = run(world, minutes * 60, lambda line: print(line, flush=True))
    for number in range(QUARTERS):
        print(f"quarter {number + 1}: {dict(soak.quarter(number))}")
    print(f"done: {dict(soak.done)}\nplanned: {dict(soak.planned)} by {soak.restarts} restarts")
    faults = [*soak.errors[:50], *soak.grown()]
    print("\n".join(faults) or "nothing failed, and nothing has grown")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), (sys.argv[2:] or [DEFAULTS.datapath])[0]))
