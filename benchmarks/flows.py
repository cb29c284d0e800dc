"""Many live flows: how fast they are set up, what memory they take, and what a packet costs then.

Each way has two labs, one with 10 flows and one with 50,000, of clients at ten addresses.  First
one flow is sent through each by turns, then packets of all flows in random order: neither the
look-up nor the kernel's sets may grow slow.  A round begins with new labs, as memory that an
earlier one left with the allocator would hide what the next one needs.

The flows are set up by a packet each, no more under way than queues hold, so that none is lost; a
flow is there when its packet has come to the server.  Before packets of all flows are counted each
flow has had some, so that whatever is done for flows that go on has been done.
"""

import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from benchmarks import ground, paths, processes, sender
from benchmarks.figures import Goal
from benchmarks.ground import AUTO, DATAPATHS, QUEUE, CannotMeasure, Progress, Wish
from benchmarks.paths import DNAT
from krelay_vm import Lab

TITLE = "Few and many live flows"
FEW, MANY = 10, 50_000
UNIT = "packets/s"
ONE, ALL = "{}: packets of one of {:,} flows", "{}: packets of all {:,} flows"
SET_UP, VISITS = "{}: set up", "{}: queue visits, packets of all {:,} flows"
RSS, KERNEL = "{}: memory of krelay per flow", "{}: memory of the kernel per flow"
WAYS = (DNAT, *DATAPATHS)


def _many_to_few(way: str, name: str, text: str, at_least: float | None = None) -> Goal:
    return Goal(text, name.format(way, MANY), name.format(way, FEW), at_least=at_least)


GOALS = (
    *(
        _many_to_few(way, name, f"{way}: {what}, {MANY:,} flows to {FEW}", bound)
        for name, what in ((ALL, "packets of all"), (ONE, "packets of one"))
        for way, bound in ((AUTO, 0.9), (QUEUE, 0.9), (DNAT, None))
    ),
    Goal("flows set up, krelay to conntrack DNAT", SET_UP.format(AUTO), SET_UP.format(DNAT)),
    Goal(
        "flows set up, krelay's queue path to conntrack DNAT",
        SET_UP.format(QUEUE),
        SET_UP.format(DNAT),
    ),
)
_DAY = 86400
_AT_ONCE = 1000
"""New flows under way: fewer than the kernel's queue holds, so that none is lost."""
_BURST = 100
_PATIENCE = 60.0
"""Seconds for all flows: none takes a millisecond."""
_USE_SECONDS = 2.0
_MEMORY = ("SUnreclaim", "VmallocUsed", "Percpu")
"""Where flows of the kernel are: in slabs, their tables in large pieces, counters by core."""


class Memory(NamedTuple):
    """Bytes."""

    krelay: int
    kernel: int


def about() -> tuple[str, ...]:
    """How it was measured."""
    return (
        f"64-byte UDP packets of {FEW} and of {MANY:,} flows, client's address and port each their "
        f"own; the clients are {sender.ADDRESSES}. First of one flow, then of all in random order; "
        "the sender goes through as many packets in its memory with few flows as with many. Set "
        f"up: from the first packet until the first of each of {MANY:,} flows has come to the "
        "server. Memory: what there is more of when all flows have been used, in krelay's process "
        f"(RSS) and in the kernel ({' + '.join(_MEMORY)} of /proc/meminfo; that is the whole "
        "machine's, so only a quiet machine gives a figure). Queue visits: packets that the kernel "
        "has handed to krelay, those that were lost there too, for each that comes to the server. "
        "The sender has one core, krelay another; the kernel relays on the sender's.",
    )


def measure(wish: Wish, progress: Progress) -> None:
    """Takes the readings."""
    with ground.told_plainly():
        for turn in range(wish.rounds):
            for way in WAYS:
                with ExitStack() as stack:
                    _round(wish, turn, way, progress, stack)


def _round(wish: Wish, turn: int, way: str, progress: Progress, stack: ExitStack) -> None:
    def take(name: str, unit: str, value: float) -> None:
        progress.take(turn, wish.rounds, name, unit, value)

    labs: list[tuple[int, Lab, str]] = []
    for flows in (FEW, MANY):
        lab = stack.enter_context(Lab())
        core = ground.cores()[1]
        to = paths.prepare(
            lab, way, ground.SERVICE_PORT, core=core, timeout=_DAY, settings=ground.NO_LIMITS
        )
        ground.check_udp(lab, to)
        ground.discard_at_server(lab)
        before = memory(lab)
        set_up = fill(lab, to, flows)
        ground.rate_of(lab, to, _USE_SECONDS, endpoints=flows - 1)
        after = memory(lab)
        labs.append((flows, lab, to))
        if flows == MANY:
            take(SET_UP.format(way), "flows/s", set_up)
            take(KERNEL.format(way), "bytes", (after.kernel - before.kernel) / flows)
            if way in DATAPATHS:
                take(RSS.format(way), "bytes", (after.krelay - before.krelay) / flows)
    for flows, lab, to in labs:
        take(ONE.format(way, flows), UNIT, ground.rate_of(lab, to, wish.seconds))
    for flows, lab, to in labs:
        visits, came = ground.queue_visits(lab), ground.received(lab)
        rate = ground.rate_of(lab, to, wish.seconds, endpoints=flows - 1)
        visits, came = ground.queue_visits(lab) - visits, ground.received(lab) - came
        take(ALL.format(way, flows), UNIT, rate)
        if way in DATAPATHS:
            take(VISITS.format(way, flows), "visits/packet", visits / came)
    for flows, lab, _ in labs if way in DATAPATHS else ():
        if (live := ground.live_flows(ground.root_of(lab))) != flows:
            raise CannotMeasure(f"{way}: {live} rows live, not {flows}")


def fill(lab: Lab, to: str, flows: int) -> float:
    """Sends a packet from as many endpoints as there are to be flows; one is there already.

    The flows per second that were set up.
    """
    client = lab.address("client")
    packets = [
        sender.datagram(sender.endpoint(client, number), (to, ground.SERVICE_PORT))
        for number in range(flows - 1)
    ]
    with lab.enter("client"):
        source = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with source:
        first, began = ground.received(lab), time.monotonic()
        for number in range(0, len(packets), _BURST):
            for packet in packets[number : number + _BURST]:
                source.sendto(packet, (to, 0))
            _await(lab, first + number + _BURST - _AT_ONCE, began)
        _await(lab, first + len(packets), began)
        return len(packets) / (time.monotonic() - began)


def _await(lab: Lab, wanted: int, began: float) -> None:
    """Waits until the server has received so many packets in all."""
    while (came := ground.received(lab)) < wanted:
        if time.monotonic() > began + _PATIENCE:
            raise CannotMeasure(f"{wanted - came} of the packets that set flows up are lost")
        time.sleep(0.0005)


def memory(lab: Lab) -> Memory:
    """What krelay has, and the kernel for all the machine."""
    relays = [program for program in lab.programs if program.host == "relay"]
    kernel = parse_meminfo(Path("/proc/meminfo").read_text())
    return Memory(processes.memory(relays).rss, kernel)


def parse_meminfo(text: str) -> int:
    """Bytes that the kernel has for itself, out of /proc/meminfo (proc_meminfo(5))."""
    sizes = dict(line.split(":") for line in text.splitlines())
    return sum(int(sizes[name].split()[0]) for name in _MEMORY) * 1024
