"""Worker.handle by itself: nanoseconds a packet, in this process, with no kernel about.

Packets are those of randomly chosen rows, so that large tables cost the misses of the cache that
they cost in earnest.  The collector is off, as in the daemon.
"""

import gc
import time
from collections.abc import Sequence
from random import Random

from benchmarks.figures import Goal
from benchmarks.ground import Progress, Wish
from krelay.flow import Endpoint, Proto, Source
from krelay.nat import Limits, NatTable
from krelay.row import Hook
from krelay.tracker import Side
from krelay.wire import tcp
from krelay.worker import Policy, Verdict, Worker

TITLE = "Worker.handle by itself"
SIZES = (10, 1_000, 50_000)
UNIT = "ns a packet"
NAME = "{}, {:,} rows"
KINDS = ("UDP", "TCP", "miss")
GOALS = tuple(
    Goal(f"{kind}, 50,000 rows to 10", NAME.format(kind, SIZES[-1]), NAME.format(kind, SIZES[0]))
    for kind in KINDS
)
_PACKETS = 4096
_LEAST_SECONDS = 0.2
_RELAY, _SERVER = Endpoint.parse("10.0.0.254:5000"), Endpoint.parse("192.168.0.1:5000")
_GPORT = 16000


def about() -> tuple[str, ...]:
    """How it was measured."""
    return (
        f"{_PACKETS:,} packets of 64 bytes of randomly chosen rows, over and over, at PREROUTING. "
        "A miss is a UDP packet that no row and no service asks for: it takes the general path.",
    )


def measure(wish: Wish, progress: Progress) -> None:
    """Takes the readings."""
    work = [(NAME.format(kind, size), *_prepared(kind, size)) for size in SIZES for kind in KINDS]
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for turn in range(wish.rounds):
            for name, worker, packets in work:
                progress.take(turn, wish.rounds, name, UNIT, _nanoseconds(worker, packets))
    finally:
        gc.enable()
        gc.unfreeze()


def _nanoseconds(worker: Worker, packets: Sequence[bytes]) -> float:
    handle, hook, count = worker.handle, int(Hook.PREROUTING), 0
    began = now = time.perf_counter_ns()
    while now - began < _LEAST_SECONDS * 1e9:
        for packet in packets:
            handle(packet, hook, 1.0)
        count += len(packets)
        now = time.perf_counter_ns()
    return (now - began) / count


def _prepared(kind: str, size: int) -> tuple[Worker, list[bytes]]:
    """A worker with that many rows, and packets for it."""
    rng = Random(size)
    nat = NatTable(Limits(flows=2 * size, flows_per_client=2 * size), rng=rng)
    worker = Worker(nat)
    ports = frozenset((_RELAY.port,))
    worker.policy = Policy(
        _GPORT, _SERVER.addr, Source.CLIENT, ports, ports, frozenset((_RELAY.addr,))
    )
    clients = [Endpoint(bytes((10, 0, 1 + n // 50000, 1 + n % 100)), 1024 + n) for n in range(size)]
    for client in clients:
        if kind == "TCP":
            row = nat.open_tcp(client, _RELAY, _SERVER, Source.CLIENT, _GPORT, 0.0)
            for side in (Side.CLIENT, Side.SERVER):
                row.tracker.saw(side, tcp.ACK)
            for rewrite in row.rewrites.values():
                rewrite.watched = False
        else:
            nat.open_udp(client, _RELAY, _SERVER, Source.CLIENT, 0.0)
    proto = Proto.TCP if kind == "TCP" else Proto.UDP
    to = Endpoint(_RELAY.addr, 9) if kind == "miss" else _RELAY
    packets = [_packet(proto, rng.choice(clients), to) for _ in range(_PACKETS)]
    verdict = worker.handle(packets[0], Hook.PREROUTING, 0.0)
    assert (verdict is Verdict.PASS) == (kind == "miss"), verdict
    return worker, packets


def _packet(proto: Proto, src: Endpoint, dst: Endpoint) -> bytes:
    """64 bytes; the checksums are what they are, as the worker only adds to them."""
    ports = src.port.to_bytes(2) + dst.port.to_bytes(2)
    head = b"\x45\0\0\x40\0\0\x40\0\x40" + bytes((proto,)) + b"\x12\x34" + src.addr + dst.addr
    if proto is Proto.UDP:
        return head + ports + (44).to_bytes(2) + b"\x56\x78" + bytes(36)
    return head + ports + bytes(8) + b"\x50\x10\xff\xff\x56\x78\0\0" + bytes(24)
