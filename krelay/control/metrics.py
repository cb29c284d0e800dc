"""The counters: each with its sentence, in the order in which `show counters` shows them.

`show counters` and the reference page are made from `COUNTERS`.  A name with a part in capitals
stands for several: `dropped_REASON` is one counter for each reason that there is.

    >>> figures = CounterFigures(PacketCounts(), [0] * len(Step), evicted=3)
    >>> values(figures)["evicted"]
    3
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import NamedTuple

from krelay.control.views import Value
from krelay.datapath.counters import PacketCounts
from krelay.datapath.reasons import by_word
from krelay.registration.messages import GAUGES
from krelay.steps import Step

ALWAYS_SHOWN = ("table_full", "client_full", "client_rate")
"""Reasons for which new flows are dropped that are shown even where no packet was."""


@dataclass(frozen=True, slots=True)
class CounterFigures:
    """What the counters are made of."""

    counts: PacketCounts
    steps: Sequence[int]
    """Packets by Step, of worker and kernel together."""
    evicted: int = 0
    own_flows_evicted: int = 0
    refused: Mapping[bytes, Mapping[str, int]] = field(default_factory=dict)
    """The clients that were refused most, by address."""
    errors: int = 0
    queue_overflow: int = 0
    socket_overflow: int = 0
    overflow_notices: int = 0
    copies_lost: int = 0
    log_lines_lost: int = 0
    own_packets_stopped: int = 0
    tcp: Mapping[str, int] = field(default_factory=dict)
    """What tcp-relays report, summed up (Relays.totals)."""


Family = Mapping[str, int] | Mapping[str, dict[str, int]]


class Metric(NamedTuple):
    """One counter, or several that differ in the part of the name that is in capitals."""

    name: str
    sentence: str
    read: Callable[[CounterFigures], int | Family]
    former: str = ""
    """The name it had; it is shown beside the new one for a release."""

    @property
    def is_family(self) -> bool:
        """Whether it stands for several."""
        return self.name.rpartition("_")[2].isupper() and "_" in self.name


def _step(name: str) -> Callable[[CounterFigures], int]:
    return lambda figures: _by_step(figures.steps)[name]


def _tcp(name: str) -> Callable[[CounterFigures], int]:
    return lambda figures: figures.tcp.get(name, 0)


def _dropped(figures: CounterFigures) -> Mapping[str, int]:
    shown = dict.fromkeys(ALWAYS_SHOWN, 0) | dict(sorted(figures.counts.dropped.items()))
    return dict(by_word(shown))


def _passed(figures: CounterFigures) -> Mapping[str, int]:
    return dict(by_word(dict(sorted(figures.counts.passed.items()))))


def _refused(figures: CounterFigures) -> Mapping[str, dict[str, int]]:
    return {str(ip_address(addr)): dict(reasons) for addr, reasons in figures.refused.items()}


def _other(figures: CounterFigures) -> Mapping[str, int]:
    """What tcp-relay counts that this krelay doesn't know."""
    known = {metric.name.removeprefix("tcp_") for metric in TCP}
    return {name: n for name, n in figures.tcp.items() if name not in known and name not in GAUGES}


STEPS = (
    Metric("T1", "Packets from clients, rewritten to the gateway port.", _step("T1")),
    Metric(
        "T2", "Packets from tcp-relay to clients, rewritten to come from the service.", _step("T2")
    ),
    Metric(
        "T3",
        "Packets from tcp-relay to the server, rewritten to come from the client.",
        _step("T3"),
    ),
    Metric("T4", "Packets from the server, rewritten to the relay port of tcp-relay.", _step("T4")),
    Metric("U1", "Forwarded packets from clients, rewritten towards the server.", _step("U1")),
    Metric("U2", "The same packets, given the source address that the server sees.", _step("U2")),
    Metric("U3", "Forwarded packets from the server, rewritten towards the client.", _step("U3")),
    Metric("U4", "The same packets, rewritten to come from the service.", _step("U4")),
    Metric(
        "D1",
        "Packets of a client's own conversation with the server, moved to another port.",
        _step("D1"),
    ),
    Metric("D2", "Packets of the server in such a conversation, moved back.", _step("D2")),
)
TCP = (
    Metric("tcp_accepted", "Connections that tcp-relay accepted from clients.", _tcp("accepted")),
    Metric("tcp_opened", "Connections whose server leg was opened.", _tcp("opened")),
    Metric(
        "tcp_closed",
        "Connections that ended in order: both ends of file were passed on.",
        _tcp("closed"),
    ),
    Metric(
        "tcp_reset",
        "Connections that ended because one leg was reset, or could not be written to.",
        _tcp("reset"),
    ),
    Metric(
        "tcp_stalled",
        "Connections that ended because one side took nothing of what was held for it.",
        _tcp("stalled"),
    ),
    Metric(
        "tcp_forgotten",
        "Connections that ended because one direction was left open, and nothing came.",
        _tcp("forgotten"),
    ),
    Metric(
        "tcp_connect_failed",
        "Connections that ended because the server could not be reached.",
        _tcp("connect_failed"),
    ),
    Metric(
        "tcp_refused",
        "Connections that ended because krelay gave no server for the client.",
        _tcp("refused"),
    ),
    Metric(
        "tcp_drained",
        "Connections that were reset because they outlived the drain.",
        _tcp("drained"),
    ),
    Metric(
        "tcp_killed", "Connections that krelay, or the end of tcp-relay, had reset.", _tcp("killed")
    ),
    Metric("tcp_from_client", "Bytes from clients that servers took.", _tcp("from_client")),
    Metric("tcp_from_server", "Bytes from servers that clients took.", _tcp("from_server")),
)
COUNTERS = (
    *STEPS,
    Metric(
        "icmp_STEP",
        "ICMP errors that were translated as packets of that step are.",
        lambda f: _by_step(f.counts.icmp),
    ),
    Metric("dropped_REASON", "Packets that the worker dropped, by reason.", _dropped),
    Metric("passed_REASON", "Packets that the worker let pass as they were, by reason.", _passed),
    Metric(
        "evicted",
        "Unconfirmed flows that were evicted to make room for new ones.",
        lambda f: f.evicted,
        "ended_early",
    ),
    Metric(
        "own_flows_evicted",
        "Flows of this host's own programs that were evicted.",
        lambda f: f.own_flows_evicted,
    ),
    Metric(
        "refused_ADDRESS",
        "New flows of that client that were refused, by reason; the ten clients with most.",
        _refused,
    ),
    Metric(
        "trace_lost",
        "Packets that were not shown to a trace because its reader was too slow.",
        lambda f: f.counts.trace_lost,
    ),
    Metric("errors", "Packets whose handling failed; the log has each.", lambda f: f.errors),
    Metric(
        "queue_overflow",
        "Packets that the kernel dropped because the queue was full.",
        lambda f: f.queue_overflow,
    ),
    Metric(
        "socket_overflow",
        "Packets that the kernel dropped because the socket buffer of the queue was full.",
        lambda f: f.socket_overflow,
    ),
    Metric(
        "overflow_notices",
        "Times that krelay met such a loss when it read the queue.",
        lambda f: f.overflow_notices,
    ),
    Metric(
        "copies_lost",
        "Times that the kernel had more to tell krelay of packets than there was room for.",
        lambda f: f.copies_lost,
    ),
    Metric(
        "log_lines_lost",
        "Log lines that could not be written without waiting.",
        lambda f: f.log_lines_lost,
    ),
    Metric(
        "own_packets_stopped",
        "Packets of krelay's own, RSTs and ICMP errors, that rules of this host stopped.",
        lambda f: f.own_packets_stopped,
    ),
    *TCP,
    Metric("tcp_OTHER", "What else a tcp-relay of another version counts.", _other),
)
"""All counters."""


def values(figures: CounterFigures) -> dict[str, Value]:
    """All counters by name; a former name follows the new one."""
    found: dict[str, Value] = {}
    for metric in COUNTERS:
        value = metric.read(figures)
        if isinstance(value, int):
            found[metric.name] = value
            if metric.former:
                found[metric.former] = value
        else:
            stem = metric.name.rpartition("_")[0]
            found |= {f"{stem}_{name}": each for name, each in value.items()}
    return found


def _by_step(counts: Sequence[int]) -> dict[str, int]:
    """T1 to T4, U1 to U4, D1, D2: what takes two steps at once counts for both."""
    at_once = {Step.U1: Step.U12, Step.U2: Step.U12, Step.U3: Step.U34, Step.U4: Step.U34}
    found = {}
    for step in Step:
        if step in at_once:
            found[step.name] = counts[step] + counts[at_once[step]]
        elif step not in at_once.values():
            found[step.name] = counts[step]
    return found
