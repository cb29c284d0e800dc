"""TCP by way of a relay, against its peers: bulk, new connections, requests, and what they cost.

Each way has a lab of its own, with a server in it; all stay while the others are measured, and each
quantity is measured on all ways before the next one.  Two families in the same rounds: the plain
proxies, and those that keep the client's address.  No way is measured before the server has seen
the address through it that it should see.
"""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from benchmarks import ground, peers, processes, web
from benchmarks.figures import Goal
from benchmarks.ground import Progress, Wish
from benchmarks.peers import Peer
from vm import Lab, Program

TITLE = "TCP: plain proxies, and proxies that keep the client's address"
DOWN, UP = "{}: download", "{}: upload"
CONNECTIONS, REQUESTS = "{}: new connections", "{}: keep-alive requests"
P50, P99 = "{}: p50 of keep-alive requests", "{}: p99 of keep-alive requests"
CPU_DOWN, CPU_UP = "{}: CPU, download", "{}: CPU, upload"
CPU_CONNECTIONS = "{}: CPU, new connections"


BULK_ONLY = (peers.HAPROXY_SPLICING, peers.NGINX_64K)
"""The same two, tuned for bulk at the cost of the rest: for information."""


def _to_better(
    ours: Peer,
    others: tuple[Peer, Peer],
    what: str,
    remark: str = "",
    at_least: float | None = None,
) -> Goal:
    return Goal(
        f"{what.format(ours.name)} to the better of HAProxy and nginx{remark}",
        what.format(ours.name),
        tuple(what.format(other.name) for other in others),
        at_least=at_least,
    )


def _to_haproxy(ours: Peer, other: Peer, what: str) -> Goal:
    return Goal(
        f"{what.format(ours.name)}, to {other.name}",
        what.format(ours.name),
        what.format(other.name),
    )


_PLAIN = (peers.TCPPROXY, (peers.HAPROXY, peers.NGINX))
_TUNED = (peers.TCPPROXY, BULK_ONLY)
_KEEPING = (peers.KRELAY, (peers.HAPROXY_KEEPING, peers.NGINX_KEEPING))
_FORWARDING = (peers.KRELAY_FORWARD, _KEEPING[1])
_KEPT = ", the client's address kept"
_COSTS = (CPU_DOWN, CPU_UP, CPU_CONNECTIONS)
GOALS = (
    _to_better(*_PLAIN, DOWN, at_least=1.2),
    _to_better(*_PLAIN, UP, at_least=1.2),
    _to_better(*_PLAIN, CONNECTIONS, at_least=0.9),
    _to_better(*_PLAIN, REQUESTS, at_least=1.0),
    _to_better(*_TUNED, DOWN, " tuned for bulk"),
    _to_better(*_TUNED, UP, " tuned for bulk"),
    *(_to_haproxy(peers.TCPPROXY, peers.HAPROXY, cost) for cost in _COSTS),
    _to_better(*_KEEPING, DOWN, _KEPT, at_least=0.1),
    _to_better(*_KEEPING, UP, _KEPT),
    _to_better(*_KEEPING, CONNECTIONS, _KEPT, at_least=0.1),
    _to_better(*_KEEPING, REQUESTS, _KEPT, at_least=0.1),
    *(_to_haproxy(peers.KRELAY, peers.HAPROXY_KEEPING, cost) for cost in _COSTS),
    *(_to_better(*_FORWARDING, what, _KEPT) for what in (DOWN, UP, CONNECTIONS, REQUESTS)),
    *(_to_haproxy(peers.KRELAY_FORWARD, peers.HAPROXY_KEEPING, cost) for cost in _COSTS),
)


class Way(NamedTuple):
    """A way that has been set up."""

    peer: Peer
    lab: Lab
    address: str
    relay: list[Program]
    big: Path


def about() -> tuple[str, ...]:
    """How it was measured."""
    return (
        f"Server: nginx, one worker. Requests and new connections: `wrk -t1 -c{web.CLIENTS}`, the "
        f"latter with `Connection: close`. Download: a file of {web.BULK_BYTES // 10**6:,} MB by "
        "curl, or what of it comes in the time of a reading. Upload: sendfile into a sink that "
        "lets the kernel throw the bytes away. One thread or worker each: HAProxy with "
        "`splice-auto`; nginx's stream module; socat, which makes a process of each connection; "
        "ours. For bulk alone also HAProxy that always splices (`splice-request`, "
        "`splice-response`), and nginx with buffers of 64 KB instead of 16. The client's address "
        "is kept by HAProxy with `usesrc clientip`, by nginx with `proxy_bind $remote_addr "
        "transparent`, by krelay: with tcp-relay, and with services written `=forward`, whose "
        "every packet visits the queue. All share the same cores.",
        "CPU: the time of the relay's processes, krelay's and tcp-relay's together. The kernel "
        "books its work in soft interrupts on whichever process it interrupts: a part of what the "
        "relay causes isn't in these figures, and a part of what its neighbours cause is.",
    )


def measure(wish: Wish, progress: Progress) -> None:
    """Takes the readings."""
    if missing := ground.missing(web.NEEDS):
        progress.leave_out(f"{TITLE}: {missing} isn't there")
        return
    with ground.told_plainly(), ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="krelay-bulk-"))
        big = Path(directory, "bulk")
        web.make_bulk(big)
        ways: list[Way] = []
        for peer in (*peers.PLAIN, *BULK_ONLY, *peers.KEEPING):
            if missing := ground.missing(peer.needs):
                progress.leave_out(f"{peer.name}: {missing} isn't there")
                continue
            progress.say(f"setting up {peer.name}")
            ways.append(set_up(stack.enter_context(Lab()), peer, big))
        asked = [way for way in ways if way.peer not in BULK_ONLY]
        if missing := ground.missing(("wrk",)):
            progress.leave_out(f"requests and new connections: {missing} isn't there")
            asked = []
        plan = ((_connections, asked), (_requests, asked), (_downloads, ways), (_uploads, ways))
        for turn in range(wish.rounds):
            for quantity, chosen in plan:
                for way in chosen:
                    for (name, unit), value in quantity(way, wish.seconds).items():
                        progress.take(turn, wish.rounds, name.format(way.peer.name), unit, value)


def set_up(lab: Lab, peer: Peer, big: Path) -> Way:
    """The way through this peer, seen to work.  Raises CannotMeasure or LabError."""
    web.serve(lab, big)
    way = Way(peer, lab, peer.address(lab), peer.start(lab, web.PORTS), big)
    web.check(lab, peer.name, way.address, peer.seen_by_server(lab), big)
    return way


Readings = dict[tuple[str, str], float]
"""By name, a place in it for the way's, and unit."""


def _connections(way: Way, seconds: float) -> Readings:
    before = processes.cpu_seconds(way.relay)
    load = web.new_connections(way.lab, way.address, seconds)
    readings = {(CONNECTIONS, "connections/s"): load.per_second}
    return readings | _cost(
        way, before, load.requests / 1e6, CPU_CONNECTIONS, "ms/1,000 connections"
    )


def _requests(way: Way, seconds: float) -> Readings:
    load = web.keep_alive(way.lab, way.address, seconds)
    return {(REQUESTS, "requests/s"): load.per_second, (P50, "ms"): load.p50, (P99, "ms"): load.p99}


def _downloads(way: Way, seconds: float) -> Readings:
    before = processes.cpu_seconds(way.relay)
    came = web.download(way.lab, way.address, seconds)
    return {(DOWN, "MB/s"): came.megabytes_per_second} | _cost(
        way, before, came.bytes / 1e9, CPU_DOWN, "s/GB"
    )


def _uploads(way: Way, seconds: float) -> Readings:
    before = processes.cpu_seconds(way.relay)
    came = web.upload(way.lab, way.address, seconds, way.big)
    return {(UP, "MB/s"): came.megabytes_per_second} | _cost(
        way, before, came.bytes / 1e9, CPU_UP, "s/GB"
    )


def _cost(way: Way, before: float, amount: float, name: str, unit: str) -> Readings:
    """Processor time per amount; nothing if there is no relay."""
    used = processes.cpu_seconds(way.relay) - before
    return {(name, unit): used / amount} if way.relay else {}
