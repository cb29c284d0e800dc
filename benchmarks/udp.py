"""UDP packets per second: one flow, client to server, by way of the relay; and what that costs.

Each way has a lab of its own that stays while the others are measured, so that no way sees
another's rules.  A first sender makes one system call a datagram, as clients do.  It is itself the
limit of the ways that are all kernel, which do their work on its core.  A second hands the kernel
whole trains: it shows what each way can do at most, and whether overload costs anything.  A third
sends half of what the first got through, while the relay host has a core to itself (alone.py): what
that core does then is the cost.
"""

from contextlib import ExitStack

from benchmarks import alone, ground, paths, sender
from benchmarks.figures import Goal
from benchmarks.ground import AUTO, QUEUE, Progress, Wish
from benchmarks.paths import DNAT, SCAPY
from krelay_vm import Lab

SIZES = (sender.SMALL, 1400)
"""Bytes of a packet."""
TITLE = "UDP, packets of one flow"
ONE, FLOOD, COST = "{}: {:,} bytes", "{}: {:,} bytes, flooded", "{}: CPU, {:,} bytes"
UNIT, COST_UNIT = "packets/s", "s/million packets"


def _ratio(text: str, name: str, above: str, below: str, at_least: float | None = None) -> Goal:
    """Of two ways, or of what is done to one."""
    return Goal(text, name.format(above), name.format(below), at_least=at_least)


def _goals(size: int) -> tuple[Goal, ...]:
    packets = f"{size:,}-byte packets"
    one, flood, cost = (name.format("{}", size) for name in (ONE, FLOOD, COST))
    first = 0.5 if size == sender.SMALL else None
    return (
        _ratio(f"krelay to conntrack DNAT, {packets}", one, AUTO, DNAT, 1.0),
        _ratio(f"krelay to conntrack DNAT, {packets}, both flooded", flood, AUTO, DNAT),
        _ratio(f"CPU, krelay to conntrack DNAT, {packets}", cost, AUTO, DNAT),
        _ratio(f"krelay's queue path to conntrack DNAT, {packets}", one, QUEUE, DNAT, first),
        _ratio(
            f"krelay's queue path to conntrack DNAT, {packets}, both flooded", flood, QUEUE, DNAT
        ),
        _ratio(f"CPU, krelay's queue path to conntrack DNAT, {packets}", cost, QUEUE, DNAT),
    )


_SMALL_ONE, _SMALL_FLOOD = (name.format("{}", sender.SMALL) for name in (ONE, FLOOD))
GOALS = (
    *(goal for size in SIZES for goal in _goals(size)),
    _ratio("krelay's queue path to a scapy worker", _SMALL_ONE, QUEUE, SCAPY, 40),
    *(
        Goal(f"{way}: flooded to not", _SMALL_FLOOD.format(way), _SMALL_ONE.format(way), bound)
        for way, bound in ((QUEUE, 0.8), (AUTO, None))
    ),
)


def about() -> tuple[str, ...]:
    """How it was measured."""
    return (
        "Packets counted at the server's interface; their sizes are those of IP. The sender has "
        "one core, the worker of krelay or scapy another; the kernel relays on the sender's core. "
        "One `send` a datagram, which limits the ways that are all kernel: they lose nothing, and "
        f"could carry more. *Flooded*: the sender lets the kernel cut trains of {ground.TRAIN} "
        "(UDP_SEGMENT), so that sending costs little.",
        "CPU: what the relay host costs, in the kernel and outside it, per million packets that "
        "come through, at half of the rate just measured. Meanwhile its packets are dealt with on "
        "a core where nothing else is (receive packet steering), and the time that this core "
        "isn't idle is counted (/proc/stat); sender and server have the other. What plain "
        "forwarding costs is in every figure.",
    )


def measure(wish: Wish, progress: Progress) -> None:
    """Takes the readings."""
    with ground.told_plainly(), ExitStack() as stack:
        ways: list[tuple[str, Lab, str]] = []
        trains = True
        for name in paths.WAYS:
            progress.say(f"setting up {name}")
            lab = stack.enter_context(Lab())
            to = paths.prepare(lab, name, ground.SERVICE_PORT, core=ground.cores()[1])
            ways.append((name, lab, to))
            ground.check_udp(lab, to)
            ground.discard_at_server(lab)
            trains = ground.offer_trains(lab) and trains
        if not trains:
            progress.leave_out("flooding: ip(8) can't limit an interface's gso_max_segs here")
        if why := alone.impossible():
            progress.leave_out(f"CPU: {why}")
        for turn in range(wish.rounds):
            for size in SIZES:
                one: dict[str, float] = {}
                for name, lab, to in ways:
                    one[name] = ground.rate_of(lab, to, wish.seconds, size=size)
                    progress.take(turn, wish.rounds, ONE.format(name, size), UNIT, one[name])
                for name, lab, to in ways if trains else ():
                    if name != SCAPY:
                        train = ground.TRAIN
                        value = ground.rate_of(lab, to, wish.seconds, per_call=train, size=size)
                        progress.take(turn, wish.rounds, FLOOD.format(name, size), UNIT, value)
                for name, lab, to in ways if not why else ():
                    value = _cost(lab, to, wish.seconds, size, max(1, round(one[name] / 2)))
                    progress.take(turn, wish.rounds, COST.format(name, size), COST_UNIT, value)


def _cost(lab: Lab, to: str, seconds: float, size: int, pace: int) -> float:
    with alone.relay_alone(lab) as meter:
        passed = ground.send_one(lab, to, seconds, meter, size=size, pace=pace)
    return passed.spent / passed.packets * 1e6
