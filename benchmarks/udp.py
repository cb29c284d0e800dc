"""UDP packets per second: one flow of 64-byte packets, client to server, by way of the relay.

Four paths, each in a lab of its own that stays while the others are measured, so that no path sees
another's rules.  A first sender makes one system call a datagram, as clients do.  It is itself the
limit of the first two paths, which do their work on its core.  A second hands the kernel whole
trains: it shows what each path can do at most, and whether overload costs anything.
"""

from collections.abc import Callable
from contextlib import ExitStack

from benchmarks import ground, scapy_worker
from benchmarks.figures import Goal
from benchmarks.ground import Progress, Wish
from vm import Lab

TITLE = "UDP, 64-byte packets of one flow"
FORWARD, DNAT, QUEUE, SCAPY = "plain forwarding", "conntrack DNAT", "krelay, queue path", "scapy"
FLOOD = "{}, flooded"
UNIT = "packets/s"
GOALS = (
    Goal("krelay's queue path to conntrack DNAT", QUEUE, DNAT, at_least=0.5),
    Goal("krelay's queue path to a scapy worker", QUEUE, SCAPY, at_least=40),
    Goal("krelay flooded to krelay", FLOOD.format(QUEUE), QUEUE, at_least=0.8),
    Goal(
        "krelay's queue path to conntrack DNAT, both flooded",
        FLOOD.format(QUEUE),
        FLOOD.format(DNAT),
    ),
)


def about() -> tuple[str, ...]:
    """How it was measured."""
    return (
        "Packets counted at the server's interface. The sender has one core, the worker of krelay "
        "or scapy another; the kernel relays on the sender's core. One `send` a datagram, which "
        "limits the first two paths: they lose nothing, and could carry more. *Flooded*: the "
        f"sender lets the kernel cut trains of {ground.TRAIN} (UDP_SEGMENT), so that sending costs "
        "little.",
    )


def measure(wish: Wish, progress: Progress) -> None:
    """Takes the readings."""
    with ground.told_plainly(), ExitStack() as stack:
        paths: list[tuple[str, Lab, str]] = []
        for name, prepare in PATHS.items():
            progress.say(f"setting up {name}")
            lab = stack.enter_context(Lab())
            paths.append((name, lab, prepare(lab)))
        trains = True
        for _, lab, to in paths:
            ground.check_udp(lab, to)
            ground.discard_at_server(lab)
            trains = ground.offer_trains(lab) and trains
        if not trains:
            progress.leave_out("flooding: ip(8) can't limit an interface's gso_max_segs here")
        for turn in range(wish.rounds):
            for name, lab, to in paths:
                value = ground.rate_of(lab, to, wish.seconds)
                progress.take(turn, wish.rounds, name, UNIT, value)
            for name, lab, to in paths:
                if trains and name != SCAPY:
                    value = ground.rate_of(lab, to, wish.seconds, per_call=ground.TRAIN)
                    progress.take(turn, wish.rounds, FLOOD.format(name), UNIT, value)


def _forwarding(lab: Lab) -> str:
    return lab.address("server")


def _dnat(lab: Lab) -> str:
    relay = lab.address("relay", "client")
    match = ("-d", relay, "-p", "udp", "--dport", str(ground.SERVICE_PORT))
    target = ("-j", "DNAT", "--to-destination", lab.address("server"))
    lab.run("relay", "iptables", "-t", "nat", "-A", "PREROUTING", *match, *target)
    return relay


def _krelay(lab: Lab) -> str:
    ground.start_krelay(lab, {"services": f"udp/{ground.SERVICE_PORT}"}, ground.cores()[1])
    return lab.address("relay", "client")


def _scapy(lab: Lab) -> str:
    relay = lab.address("relay", "client")
    match = ("-d", relay, "-p", "udp", "--dport", str(ground.SERVICE_PORT))
    target = ("-j", "NFQUEUE", "--queue-num", "0")
    lab.run("relay", "iptables", "-t", "raw", "-A", "PREROUTING", *match, *target)
    command = (*ground.PYTHON, scapy_worker.__file__, "0", lab.address("server"))
    worker = lab.start("relay", *ground.pinned(ground.cores()[1]), *command)
    lab.wait(lambda: "serving" in worker.output or worker.poll() is not None, "scapy's worker", 20)
    return relay


PATHS: dict[str, Callable[[Lab], str]] = {
    FORWARD: _forwarding,
    DNAT: _dnat,
    QUEUE: _krelay,
    SCAPY: _scapy,
}
"""Each prepares its lab and returns the address that the client sends to."""
