"""The counters: their names, their order, and that each has a sentence."""

from collections import Counter

from krelay.control import metrics
from krelay.control.metrics import COUNTERS, CounterFigures
from krelay.datapath.counters import PacketCounts
from krelay.registration import messages
from krelay.steps import Step
from tests.tools.packets import addr


def test_counters_are_named_by_step_and_reason() -> None:
    counts = PacketCounts()
    for step, number in zip(Step, range(1, 13), strict=True):
        counts.icmp[step] = 20 * number
    counts.passed = Counter({"own": 2, "direct": 1})
    counts.dropped = Counter({"no_flow": 5, "table_full": 7})
    counts.trace_lost = 6

    found = metrics.values(
        CounterFigures(
            counts,
            range(1, 13),
            evicted=8,
            own_flows_evicted=11,
            refused={addr("D"): {"table_full": 5, "client_rate": 2}, addr("C"): {"table_full": 2}},
            errors=1,
            overflow_notices=2,
            queue_overflow=3,
            socket_overflow=4,
            copies_lost=9,
            log_lines_lost=10,
            own_packets_stopped=11,
            tcp={"open": 3, "accepted": 10, "from_client": 2**64, "zebra": 1},
        )
    )

    assert list(found.items()) == [
        ("T1", 1),
        ("T2", 2),
        ("T3", 3),
        ("T4", 4),
        ("U1", 5 + 9),
        ("U2", 6 + 9),
        ("U3", 7 + 10),
        ("U4", 8 + 10),
        ("D1", 11),
        ("D2", 12),
        ("icmp_T1", 20),
        ("icmp_T2", 40),
        ("icmp_T3", 60),
        ("icmp_T4", 80),
        ("icmp_U1", 100 + 180),
        ("icmp_U2", 120 + 180),
        ("icmp_U3", 140 + 200),
        ("icmp_U4", 160 + 200),
        ("icmp_D1", 220),
        ("icmp_D2", 240),
        ("dropped_table_full", 7),
        ("dropped_client_full", 0),
        ("dropped_client_rate", 0),
        ("dropped_no_flow", 5),
        ("dropped_no_row", 5),  # as it was called before
        ("passed_direct", 1),
        ("passed_own", 2),
        ("evicted", 8),
        ("ended_early", 8),  # as it was called before
        ("own_flows_evicted", 11),
        ("refused_10.0.0.9", {"table_full": 5, "client_rate": 2}),
        ("refused_10.0.0.1", {"table_full": 2}),
        ("trace_lost", 6),
        ("errors", 1),
        ("queue_overflow", 3),
        ("socket_overflow", 4),
        ("overflow_notices", 2),
        ("copies_lost", 9),
        ("log_lines_lost", 10),
        ("own_packets_stopped", 11),
        ("tcp_accepted", 10),
        ("tcp_opened", 0),
        ("tcp_closed", 0),
        ("tcp_reset", 0),
        ("tcp_stalled", 0),
        ("tcp_forgotten", 0),
        ("tcp_connect_failed", 0),
        ("tcp_refused", 0),
        ("tcp_drained", 0),
        ("tcp_killed", 0),
        ("tcp_from_client", 2**64),
        ("tcp_from_server", 0),
        ("tcp_zebra", 1),
    ]


def test_each_counter_has_one_sentence_and_one_name() -> None:
    assert all(each.sentence[0].isupper() and each.sentence.endswith(".") for each in COUNTERS)
    names = [each.name for each in COUNTERS]
    assert len(set(names)) == len(names)


def test_what_tcp_relays_count_is_what_the_table_knows() -> None:
    assert [f"tcp_{name}" for name in messages.COUNTERS] == [each.name for each in metrics.TCP]


def test_families_are_named_by_a_part_in_capitals() -> None:
    families = [each.name for each in COUNTERS if each.is_family]
    assert families == [
        "icmp_STEP",
        "dropped_REASON",
        "passed_REASON",
        "refused_ADDRESS",
        "tcp_OTHER",
    ]
    figures = CounterFigures(PacketCounts(), [0] * len(Step))
    assert all(isinstance(each.read(figures), int) != each.is_family for each in COUNTERS)
