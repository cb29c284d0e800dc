"""What idle connections cost a proxy: memory, processor time, and the speed of those that work.

A hundred connections carry requests and answers by themselves.  Then thousands more are opened;
each carries one request and its answer, so that it is open from end to end, and falls silent.  Now
the same hundred have another go.  Memory is what the thousands have added.

A turn has a lab and a proxy of its own: memory that an earlier turn left with the allocator would
hide what the next one needs, and no port is still in TIME_WAIT.  The client is this process, with
sockets opened in the client host.
"""

import select
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack

from benchmarks import echo, ground, peers, processes
from benchmarks.figures import Goal
from benchmarks.ground import CannotMeasure, Progress, Wish
from benchmarks.peers import Peer
from krelay_vm import Lab

TITLE = "Thousands of idle connections"
WAYS = (peers.HAPROXY, peers.NGINX, peers.TCPPROXY)
RSS, PSS = "{}: RSS per idle connection", "{}: PSS per idle connection"
CPU = "{}: CPU while all are idle"
ALONE, AMONG = "{}, 100 active alone", "{}, 100 active among the idle"
GOALS = (
    Goal(
        "memory of an idle connection, tcpproxy to HAProxy",
        RSS.format(peers.TCPPROXY.name),
        RSS.format(peers.HAPROXY.name),
        at_most=1.0,
    ),
    *(
        Goal(
            f"100 active among the idle to the same alone, {peer.name}",
            AMONG.format(peer.name),
            ALONE.format(peer.name),
            at_least=0.8 if peer is peers.TCPPROXY else None,
        )
        for peer in WAYS
    ),
)
IDLE, ACTIVE = 10_000, 100
IDLE_SECONDS = 5
REQUEST = bytes(range(100))
_PORT = 80
_PATIENCE = 10.0

Readings = dict[tuple[str, str], float]


def about() -> tuple[str, ...]:
    """How it was measured."""
    return (
        f"{IDLE:,} idle connections through each proxy, or as many as files may be open. RSS and "
        "PSS: what the proxy's processes have more of with them than without, for each; what the "
        "kernel holds for sockets is not in it, and the same for all. CPU: over "
        f"{IDLE_SECONDS} s in which nothing is sent. Active: {ACTIVE} connections with requests "
        f"and answers of {len(REQUEST)} bytes one after the other; client and server are Python, "
        "and share the cores with the proxy.",
    )


def measure(wish: Wish, progress: Progress) -> None:
    """Takes the readings."""
    idle = min(IDLE, peers.capacity() - ACTIVE) // ACTIVE * ACTIVE
    if idle < IDLE:
        progress.leave_out(f"more than {idle:,} idle connections: no more files may be open here")
    ways = []
    for peer in WAYS:
        if missing := ground.missing(peer.needs):
            progress.leave_out(f"{peer.name}: {missing} isn't there")
        else:
            ways.append(peer)
    with ground.told_plainly():
        for turn in range(wish.rounds):
            for peer in ways:
                for (name, unit), value in through(peer, idle, wish.seconds).items():
                    progress.take(turn, wish.rounds, name.format(peer.name), unit, value)


def through(peer: Peer, idle: int, seconds: float) -> Readings:
    """All that is measured of one proxy in a round."""
    with Lab() as lab, ExitStack() as held:
        lab.start("server", *ground.PYTHON, echo.__file__, str(_PORT))
        lab.wait_listening("server", "tcp", _PORT)
        relay = peer.start(lab, [_PORT])
        to = (peer.address(lab), _PORT)
        active = _opened(lab, to, ACTIVE, held)
        alone = round_trips(active, seconds)
        before = processes.memory(relay)
        for _ in range(idle // ACTIVE):
            _opened(lab, to, ACTIVE, held)
        after = processes.memory(relay)
        used = processes.cpu_seconds(relay)
        time.sleep(IDLE_SECONDS)
        used = processes.cpu_seconds(relay) - used
        among = round_trips(active, seconds)
    return {
        (RSS, "bytes"): (after.rss - before.rss) / idle,
        (PSS, "bytes"): (after.pss - before.pss) / idle,
        (CPU, "% of a core"): used / IDLE_SECONDS * 100,
        (ALONE, "round trips/s"): alone,
        (AMONG, "round trips/s"): among,
    }


def _opened(lab: Lab, to: tuple[str, int], count: int, held: ExitStack) -> list[socket.socket]:
    """Connections that have carried a request and its answer."""
    with lab.enter("client"):
        made = [
            held.enter_context(socket.socket(socket.AF_INET, socket.SOCK_STREAM))
            for _ in range(count)
        ]
    for each in made:
        each.settimeout(_PATIENCE)
        each.connect(to)
    for each in made:
        each.sendall(REQUEST)
    for each in made:
        _take_answer(each)
    return made


def _take_answer(connection: socket.socket) -> None:
    """An answer so short comes in one piece."""
    try:
        answer = connection.recv(len(REQUEST) + 1)
    except OSError as error:
        raise CannotMeasure(f"no answer: {error}") from None
    if answer != REQUEST:
        raise CannotMeasure(f"an answer that isn't the request: {answer!r}")


def round_trips(connections: Sequence[socket.socket], seconds: float) -> float:
    """Requests and answers per second on all of them together, one at a time on each."""
    by_number = {each.fileno(): each for each in connections}
    with select.epoll(len(by_number)) as poll:
        for each in connections:
            poll.register(each, select.EPOLLIN)
        count, waiting = 0, len(by_number)
        began = now = time.monotonic()
        for each in connections:
            each.sendall(REQUEST)
        while waiting:
            ready = poll.poll(_PATIENCE, len(by_number))
            if not ready:
                raise CannotMeasure(f"{waiting} requests without an answer for {_PATIENCE:g} s")
            now = time.monotonic()
            for number, _ in ready:
                _take_answer(by_number[number])
                if now < began + seconds:
                    by_number[number].sendall(REQUEST)
                else:
                    waiting -= 1
            count += len(ready)
    return count / (now - began)
