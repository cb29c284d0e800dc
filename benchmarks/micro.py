"""Worker.handle by itself: nanoseconds a packet, in this process, with no kernel about.

And what a flow costs besides: its first packet, what tcp-relay says about it, its end.

Packets are those of randomly chosen flows, so that large tables cost the misses of the cache that
they cost in earnest.  The collector is off, as in the daemon.

What it costs that packets could be traced, while nobody does, is shown by a twin of `handle` from
whose source the tracing was cut out.
"""

import ast
import gc
import inspect
import textwrap
import time
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from statistics import median
from types import MethodType
from typing import TypeVar

from benchmarks.figures import Goal
from benchmarks.ground import Progress, Wish
from knet.endpoint import Endpoint, Proto, Source
from knet.socketdiag import SocketDiag
from knet.wire import tcp
from krelay.datapath import worker as worker_module
from krelay.datapath.policy import Policy
from krelay.datapath.verdict import Verdict
from krelay.datapath.worker import Worker
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import Rewrite
from krelay.nat.table import NatTable
from krelay.registration.messages import Close, Open, emit, parse_request
from krelay.registration.registry import Relays
from krelay.steps import Hook, Side
from krelay.trace.capture import Capture
from krelay.trace.lines import Lines, Recorder

T = TypeVar("T")
R = TypeVar("R")

TITLE = "Worker.handle by itself"
SIZES = (10, 1_000, 50_000)
UNIT = "ns a packet"
NAME = "{}, {:,} rows"
KINDS = ("UDP", "TCP", "miss")
TRACED_SIZE = 1_000
CUT_OUT, LINES, CAPTURED = "tracing cut out", "shown as lines", "captured"
PRESENT = "tracing there, nobody traces"
FIRST_UDP, FIRST_TCP = "UDP, first packet of a flow", "TCP, SYN of a connection"
OPEN, CLOSE = "open, read and answered", "close, read"
END_UDP, END_TCP = "UDP, row ended", "TCP, row ended"
MESSAGE_UNIT, FLOW_UNIT = "ns a message", "ns a row"


def _traced(kind: str, how: str) -> str:
    return f"{NAME.format(kind, TRACED_SIZE)}, {how}"


GOALS = (
    *(
        Goal(f"{kind}, 50,000 rows to 10", NAME.format(kind, 50_000), NAME.format(kind, 10))
        for kind in KINDS
    ),
    Goal("UDP, first packet of a flow to later ones", FIRST_UDP, _traced("UDP", PRESENT)),
    Goal("TCP, SYN of a connection to later packets", FIRST_TCP, _traced("TCP", PRESENT)),
    *(
        Goal(
            f"{kind}, nobody traces, to no tracing", _traced(kind, PRESENT), _traced(kind, CUT_OUT)
        )
        for kind in KINDS
    ),
    *(
        Goal(f"{kind}, {how}, to nobody traces", _traced(kind, how), _traced(kind, PRESENT))
        for how in (LINES, CAPTURED)
        for kind in ("UDP", "TCP")
    ),
)
_PACKETS = 4096
_FLOWS, _FLOWS_A_TURN = 1_000, 50
_TURN = 256
"""Packets of a turn: done before another program has the processor."""
_LEAST_SECONDS = 0.2
_RELAY, _SERVER = Endpoint.parse("10.0.0.254:5000"), Endpoint.parse("192.168.0.1:5000")
_GPORT = 16000


def about() -> tuple[str, ...]:
    """How it was measured."""
    return (
        f"{_PACKETS:,} packets of 64 bytes of randomly chosen rows, over and over, at PREROUTING. "
        "A miss is a UDP packet that no row and no service asks for: it takes the general path.",
        "Tracing cut out: `handle` without the few lines that ask whether somebody traces; both by "
        "turns, and of each the best turn. Lines and captures are made and thrown away.",
        f"First packets, messages of tcp-relay and ends of rows: {_FLOWS:,} of each, for as many "
        "clients, one kind after the other.",
    )


def measure(wish: Wish, progress: Progress) -> None:
    """Takes the readings."""
    work = [(NAME.format(kind, size), *_prepared(kind, size)) for size in SIZES for kind in KINDS]
    pairs = [(kind, *_prepared(kind, TRACED_SIZE)) for kind in KINDS]
    traced = [
        (_traced(kind, how), *_prepared(kind, TRACED_SIZE, recorder))
        for how, recorder in ((LINES, Lines()), (CAPTURED, Capture(0)))
        for kind in ("UDP", "TCP")
    ]
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for turn in range(wish.rounds):
            for name, worker, packets in (*work, *traced):
                [costs] = _nanoseconds([worker.handle], packets)
                progress.take(turn, wish.rounds, name, UNIT, median(costs))
            for kind, worker, packets in pairs:
                twin = MethodType(_without_tracing(), worker)
                both = _nanoseconds([worker.handle, twin], packets)
                for how, costs in zip((PRESENT, CUT_OUT), both, strict=True):
                    progress.take(turn, wish.rounds, _traced(kind, how), UNIT, min(costs))
            for (name, unit), cost in _lives().items():
                progress.take(turn, wish.rounds, name, unit, cost)
    finally:
        gc.enable()
        gc.unfreeze()


class _Cut(ast.NodeTransformer):
    """Takes out what asks for a tracer."""

    def visit_If(self, node: ast.If) -> ast.AST | None:
        self.generic_visit(node)
        return None if "self.on_rewrite" in ast.unparse(node.test) else node

    def visit_IfExp(self, node: ast.IfExp) -> ast.AST:
        return node.body if "self.on_untouched" in ast.unparse(node.test) else node


def _without_tracing() -> Callable[..., bytes | Verdict]:
    """Worker.handle as if nobody could trace."""
    whole = textwrap.dedent(inspect.getsource(Worker.handle))
    cut = ast.unparse(ast.fix_missing_locations(_Cut().visit(ast.parse(whole))))
    assert "self.on_" in whole
    assert "self.on_" not in cut
    made: dict[str, Callable[..., bytes | Verdict]] = {}
    exec(compile(cut, "handle without tracing", "exec"), vars(worker_module), made)
    return made["handle"]


def _nanoseconds(
    handles: Sequence[Callable[[bytes, int, float], bytes | Verdict]], packets: Sequence[bytes]
) -> list[list[float]]:
    """What a packet costs each of them, in many short turns; each is the first in its turn."""
    hook, clock = int(Hook.PREROUTING), time.perf_counter_ns
    found: list[list[float]] = [[] for _ in handles]
    order = list(range(len(handles)))
    slices = [packets[at : at + _TURN] for at in range(0, len(packets), _TURN)]
    until = clock() + _LEAST_SECONDS * 1e9 * len(handles)
    while not found[0] or clock() < until:
        for some in slices:
            for number in order:
                handle = handles[number]
                began = clock()
                for packet in some:
                    handle(packet, hook, 1.0)
                found[number].append((clock() - began) / len(some))
            order.append(order.pop(0))
    return found


def _lives() -> dict[tuple[str, str], float]:
    """What flows cost besides their later packets, by name and unit."""
    clock = time.perf_counter_ns
    clients = [Endpoint(bytes((10, 0, 1, 1 + n % 100)), 1024 + n) for n in range(_FLOWS)]
    first = {
        proto: [_packet(proto, client, _RELAY, tcp.SYN) for client in clients] for proto in Proto
    }
    ports = [Endpoint(_RELAY.addr, 30000 + n) for n in range(_FLOWS)]
    asked = [emit(Open(n, clients[n], _GPORT, ports[n])) for n in range(_FLOWS)]
    told = [emit(Close(port)) for port in ports]
    costs: dict[tuple[str, str], list[float]] = {}

    def each(name: str, unit: str, do: Callable[[T], R], things: Sequence[T]) -> list[R]:
        results: list[R] = []
        for at in range(0, len(things), _FLOWS_A_TURN):
            some = things[at : at + _FLOWS_A_TURN]
            began = clock()
            results += [do(thing) for thing in some]
            costs.setdefault((name, unit), []).append((clock() - began) / len(some))
        return results

    kernel = SocketDiag()  # of what is measured nothing asks it
    until = clock() + _LEAST_SECONDS * 1e9 * 6
    while not costs or clock() < until:
        worker = _worker(_FLOWS)
        nat = worker.nat
        relays = Relays(nat, partial(getattr, worker, "policy"), kernel)
        relays.joined(_unheard, uid=0)
        relays.listens(_unheard, _GPORT)

        def come(packet: bytes, worker: Worker = worker) -> bytes | Verdict:
            return worker.handle(packet, Hook.PREROUTING, 1.0)

        def answered(message: bytes, relays: Relays = relays) -> bytes:
            answer = relays.handle(parse_request(message), _unheard, 1.0)
            return emit(answer) if answer else b""

        assert all(isinstance(new, bytes) for new in each(FIRST_UDP, UNIT, come, first[Proto.UDP]))
        each(END_UDP, FLOW_UNIT, nat.end, list(nat))
        assert all(isinstance(new, bytes) for new in each(FIRST_TCP, UNIT, come, first[Proto.TCP]))
        for flow in nat:
            flow.tracker.client_acked = True
        assert all(b"server" in answer for answer in each(OPEN, MESSAGE_UNIT, answered, asked))
        for flow in nat:
            flow.leg = 1  # the number of tcp-relay's SYN, which has come since
        each(CLOSE, MESSAGE_UNIT, answered, told)
        assert all(flow.closed_at for flow in nat)
        each(END_TCP, FLOW_UNIT, nat.end, list(nat))
    kernel.close()
    return {at: median(found) for at, found in costs.items()}


def _unheard(_: object) -> None:
    """Nobody listens."""


def _worker(flows: int) -> Worker:
    """A worker that relays, with room for so many flows."""
    rng = Random(flows)
    nat = NatTable(FlowLimits(flows=2 * flows, flows_per_client=2 * flows), rng=rng)
    worker = Worker(nat)
    ports = frozenset((_RELAY.port,))
    worker.policy = Policy(
        _GPORT,
        frozenset((_GPORT,)),
        _SERVER.addr,
        Source.CLIENT,
        ports,
        ports,
        frozenset((_RELAY.addr,)),
    )
    return worker


def _prepared(kind: str, size: int, recorder: Recorder | None = None) -> tuple[Worker, list[bytes]]:
    """A worker with that many flows, and packets for it; all that is rewritten is recorded."""
    worker, rng = _worker(size), Random(size)
    nat = worker.nat
    clients = [Endpoint(bytes((10, 0, 1 + n // 50000, 1 + n % 100)), 1024 + n) for n in range(size)]
    for client in clients:
        if kind == "TCP":
            flow = nat.open_tcp(client, _RELAY, _SERVER, Source.CLIENT, _GPORT, 0.0)
            for side in (Side.CLIENT, Side.SERVER):
                flow.tracker.saw(side, tcp.ACK)
            for rewrite in flow.rewrites.values():
                rewrite.watched = False
        else:
            nat.open_forwarded(Proto.UDP, client, _RELAY, _SERVER, Source.CLIENT, 0.0)
    proto = Proto.TCP if kind == "TCP" else Proto.UDP
    to = Endpoint(_RELAY.addr, 9) if kind == "miss" else _RELAY
    packets = [_packet(proto, rng.choice(clients), to) for _ in range(_PACKETS)]
    verdict = worker.handle(packets[0], Hook.PREROUTING, 0.0)
    assert (verdict is Verdict.PASS) == (kind == "miss"), verdict
    if recorder is not None:

        def record(rewrite: Rewrite, before: bytes, after: bytes) -> None:
            recorder.rewritten(rewrite, before, after, time.time_ns())

        worker.on_rewrite = record
    return worker, packets


def _packet(proto: Proto, src: Endpoint, dst: Endpoint, flags: int = tcp.ACK) -> bytes:
    """64 bytes; the checksums are what they are, as the worker only adds to them."""
    ports = src.port.to_bytes(2) + dst.port.to_bytes(2)
    head = b"\x45\0\0\x40\0\0\x40\0\x40" + bytes((proto,)) + b"\x12\x34" + src.addr + dst.addr
    if proto is Proto.UDP:
        return head + ports + (44).to_bytes(2) + b"\x56\x78" + bytes(36)
    return head + ports + bytes(8) + bytes((0x50, flags)) + b"\xff\xff\x56\x78\0\0" + bytes(24)
