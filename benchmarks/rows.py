"""What a packet costs with few and with many live rows: the look-up must not grow with the table.

Two krelays in two labs, one with 10 rows and one with 50,000, of clients at ten addresses.  First
one flow is sent through each by turns; a packet's cost is the reciprocal of packets per second.
Then packets of all rows, in random order: what comes on top are the misses of the processor's
cache, which a table of that size costs in any language.
"""

import socket
import time
from contextlib import ExitStack
from pathlib import Path

from benchmarks import ground, sender
from benchmarks.figures import Goal
from benchmarks.ground import CannotMeasure, Progress, Wish
from vm import Lab

TITLE = "Cost per packet with few and with many live rows"
FEW, MANY = 10, 50_000
UNIT = "packets/s"
ONE, ALL = "{:,} live rows, packets of one", "{:,} live rows, packets of all"
GOALS = (
    Goal("cost of a packet, 50,000 rows to 10", ONE.format(FEW), ONE.format(MANY), at_most=1.3),
    Goal("the same, packets of all rows", ALL.format(FEW), ALL.format(MANY)),
)
_LIMITS = {
    "services": f"udp/{ground.SERVICE_PORT}",
    "limits/flows": "100000",
    "limits/flows_per_client": "65536",
    "timeouts/udp": "86400",
}
_AT_ONCE = 2000
"""New rows under way: fewer than the kernel's queue holds, so that none is lost."""


def about() -> tuple[str, ...]:
    """How it was measured."""
    return (
        f"krelay's queue path, 64-byte UDP packets: first of one flow, then of all rows in random "
        f"order. The rows are those of {sender.ADDRESSES} clients.",
    )


def measure(wish: Wish, progress: Progress) -> None:
    """Takes the readings."""
    with ground.told_plainly(), ExitStack() as stack:
        labs: list[tuple[int, Lab, Path, str]] = []
        for wanted in (FEW, MANY):
            lab = stack.enter_context(Lab())
            root = ground.start_krelay(lab, _LIMITS, ground.cores()[1])
            to = lab.address("relay", "client")
            ground.check_udp(lab, to)
            ground.discard_at_server(lab)
            began = time.monotonic()
            _fill(lab, root, to, wanted)
            progress.say(f"{wanted:,} rows made in {time.monotonic() - began:.1f} s")
            labs.append((wanted, lab, root, to))
        for turn in range(wish.rounds):
            for rows, lab, _, to in labs:
                value = ground.rate_of(lab, to, wish.seconds)
                progress.take(turn, wish.rounds, ONE.format(rows), UNIT, value)
            for rows, lab, _, to in labs:
                value = ground.rate_of(lab, to, wish.seconds, endpoints=rows - 1)
                progress.take(turn, wish.rounds, ALL.format(rows), UNIT, value)
            for rows, _, root, _ in labs:
                if (live := ground.live_rows(root)) != rows:
                    raise CannotMeasure(f"{live} rows live, not {rows}")


def _fill(lab: Lab, root: Path, to: str, wanted: int) -> None:
    """Sends a packet from as many endpoints as there are to be rows; one row is there already."""
    client, service = lab.address("client"), (to, ground.SERVICE_PORT)
    with lab.enter("client"):
        source = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
    with source:
        for number in range(wanted - 1):
            packet = sender.datagram(sender.endpoint(client, number), service)
            source.sendto(packet, (to, 0))
            if number % _AT_ONCE == 0:
                _await_rows(lab, root, number + 1)
    _await_rows(lab, root, wanted)


def _await_rows(lab: Lab, root: Path, wanted: int) -> None:
    lab.wait(lambda: ground.live_rows(root) >= wanted, f"{wanted:,} rows", 20)
