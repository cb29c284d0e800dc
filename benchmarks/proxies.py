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

from benchmarks import alone, ground, peers, web
from benchmarks.figures import Goal
from benchmarks.ground import Progress, Wish
from benchmarks.peers import Peer
from krelay_vm import Lab

TITLE = "TCP: plain proxies, and proxies that keep the client's address"
DOWN, UP = "{}: download", "{}: upload"
CONNECTIONS, REQUESTS = "{}: new connections", "{}: keep-alive requests"
P50, P99 = "{}: p50 of keep-alive requests", "{}: p99 of keep-alive requests"
CPU_DOWN, CPU_UP = "{}: CPU, download", "{}: CPU, upload"
CPU_CONNECTIONS = "{}: CPU, new connections"
VISITS = "{}: queue visits, download"


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


def _to(ours: Peer, other: Peer, what: str, at_most: float | None = None) -> Goal:
    return Goal(
        f"{what.format(ours.name)}, to {other.name}",
        what.format(ours.name),
        what.format(other.name),
        at_most=at_most,
    )


_PLAIN = (peers.TCPPROXY, (peers.HAPROXY, peers.NGINX))
_TUNED = (peers.TCPPROXY, BULK_ONLY)
_KEEPERS = (peers.HAPROXY_KEEPING, peers.NGINX_KEEPING)
_KEPT = ", the client's address kept"
_WORK = (DOWN, UP, CONNECTIONS, REQUESTS)
_COSTS = (CPU_DOWN, CPU_UP, CPU_CONNECTIONS)
_BOUNDS: dict[Peer, tuple[float | None, ...]] = {
    peers.KRELAY: (1.1, 1.1, 0.6, 0.8),
    peers.KRELAY_QUEUE: (0.1, None, 0.1, 0.1),
    peers.FORWARD: (None,) * 4,
    peers.FORWARD_QUEUE: (None,) * 4,
}
"""How much of the better proxy's work each of ours should do."""
GOALS = (
    _to_better(*_PLAIN, DOWN, at_least=1.2),
    _to_better(*_PLAIN, UP, at_least=1.2),
    _to_better(*_PLAIN, CONNECTIONS, at_least=0.9),
    _to_better(*_PLAIN, REQUESTS, at_least=1.0),
    _to_better(*_TUNED, DOWN, " tuned for bulk"),
    _to_better(*_TUNED, UP, " tuned for bulk"),
    *(_to(peers.TCPPROXY, peers.HAPROXY, cost) for cost in _COSTS),
    *(
        _to_better(ours, _KEEPERS, work, _KEPT, at_least)
        for ours, bounds in _BOUNDS.items()
        for work, at_least in zip(_WORK, bounds, strict=True)
    ),
    *(_to(peers.FORWARD, peers.DNAT, work) for work in _WORK),
    *(_to(ours, peers.HAPROXY_KEEPING, cost) for ours in peers.OURS for cost in _COSTS),
    *(_to(peers.FORWARD, peers.DNAT, cost) for cost in _COSTS),
    _to(peers.KRELAY, peers.KRELAY_QUEUE, VISITS, at_most=0.001),
    _to(peers.FORWARD, peers.FORWARD_QUEUE, VISITS, at_most=0.001),
)


class Way(NamedTuple):
    """A way that has been set up."""

    peer: Peer
    lab: Lab
    address: str
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
        "transparent`, by the kernel's own NAT (nft, with connection tracking), by IPVS where the "
        "kernel has that loaded (CONFIG_IP_VS), by krelay: with tcp-relay, and with services "
        "written `=forward`, each with both data paths. All share the same cores.",
        "CPU: what the relay host costs, in the kernel and outside it, in readings of their own. "
        "Meanwhile its programs and its packets have a core to themselves (receive packet "
        "steering), and the time that this core isn't idle is counted (/proc/stat); clients and "
        "servers have the other. What plain forwarding costs, `direct`, is in every figure.",
        "Queue visits: packets that the kernel has handed to krelay during the download, for each "
        "GB that came.",
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
        plan = [(_connections, asked), (_requests, asked), (_downloads, ways), (_uploads, ways)]
        if why := alone.impossible():
            progress.leave_out(f"CPU: {why}")
        else:
            plan += [(_cost_of_connections, asked), (_cost_down, ways), (_cost_up, ways)]
        for turn in range(wish.rounds):
            for quantity, chosen in plan:
                for way in chosen:
                    for (name, unit), value in quantity(way, wish.seconds).items():
                        progress.take(turn, wish.rounds, name.format(way.peer.name), unit, value)


def set_up(lab: Lab, peer: Peer, big: Path) -> Way:
    """The way through this peer, seen to work.  Raises CannotMeasure or LabError."""
    web.serve(lab, big)
    peer.start(lab, web.PORTS)
    way = Way(peer, lab, peer.address(lab), big)
    web.check(lab, peer.name, way.address, peer.seen_by_server(lab), big)
    return way


Readings = dict[tuple[str, str], float]
"""By name, a place in it for the way's, and unit."""


def _connections(way: Way, seconds: float) -> Readings:
    load = web.new_connections(way.lab, way.address, seconds)
    return {(CONNECTIONS, "connections/s"): load.per_second}


def _requests(way: Way, seconds: float) -> Readings:
    load = web.keep_alive(way.lab, way.address, seconds)
    return {(REQUESTS, "requests/s"): load.per_second, (P50, "ms"): load.p50, (P99, "ms"): load.p99}


def _downloads(way: Way, seconds: float) -> Readings:
    has_queue = way.peer in peers.OURS
    before = ground.queue_visits(way.lab) if has_queue else 0
    came = web.download(way.lab, way.address, seconds)
    readings = {(DOWN, "MB/s"): came.megabytes_per_second}
    if has_queue:
        visits = ground.queue_visits(way.lab) - before
        readings[VISITS, "visits/GB"] = visits / came.bytes * 1e9
    return readings


def _uploads(way: Way, seconds: float) -> Readings:
    came = web.upload(way.lab, way.address, seconds, way.big)
    return {(UP, "MB/s"): came.megabytes_per_second}


def _cost_of_connections(way: Way, seconds: float) -> Readings:
    with alone.relay_alone(way.lab) as meter:
        before = meter()
        load = web.new_connections(way.lab, way.address, seconds)
        spent = meter() - before
    return {(CPU_CONNECTIONS, "ms/1,000 connections"): spent / load.requests * 1e6}


def _cost_down(way: Way, seconds: float) -> Readings:
    with alone.relay_alone(way.lab) as meter:
        before = meter()
        came = web.download(way.lab, way.address, seconds)
        spent = meter() - before
    return {(CPU_DOWN, "s/GB"): spent / came.bytes * 1e9}


def _cost_up(way: Way, seconds: float) -> Readings:
    with alone.relay_alone(way.lab) as meter:
        before = meter()
        came = web.upload(way.lab, way.address, seconds, way.big)
        spent = meter() - before
    return {(CPU_UP, "s/GB"): spent / came.bytes * 1e9}
