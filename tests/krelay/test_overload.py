"""Paces, who was refused, who makes room: against slow twins, and bounded whatever is forged."""

from collections import Counter
from operator import attrgetter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krelay.flow import Source
from krelay.nat import NatTable
from krelay.overload import EARLY, LOOKS, NewFlows, Pace, Refused, Spare
from krelay.row import Row
from tests.tools.packets import at

C, D = b"\x0a\0\0\x01", b"\x0a\0\0\x02"
gaps = st.lists(st.sampled_from((0.0, 0.0, 0.0, 0.001, 0.05, 0.1, 0.3, 1.0, 7.0)), max_size=200)


class Bucket:
    """The twin: tokens that drip in."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self.level, self.at = float(burst), 0.0

    def admits(self, now: float) -> bool:
        self.level = min(self.burst, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level < 1 - 1e-6:
            return False
        self.level -= 1
        return True


@given(gaps=gaps, rate=st.sampled_from((1, 2, 8, 1000)), burst=st.sampled_from((1, 2, 50)))
def test_a_pace_is_a_bucket_of_tokens(gaps: list[float], rate: int, burst: int) -> None:
    pace, twin, now = Pace(rate, burst), Bucket(rate, burst), 100.0
    twin.at = now
    for gap in gaps:
        now += gap
        assert pace.admits(now) is twin.admits(now)


@given(gaps=gaps, rate=st.sampled_from((1, 2, 8, 1000)))
def test_new_flows_are_a_bucket_for_each_client(gaps: list[float], rate: int) -> None:
    flows, twins, now = NewFlows(), {C: Bucket(rate, rate), D: Bucket(rate, rate)}, 0.0
    for number, gap in enumerate(gaps):
        now += gap
        client = (C, C, D)[number % 3]
        admitted = flows.admits(client, rate, now)
        assert admitted is twins[client].admits(now)
        if admitted:
            flows.began(client, rate, now)
        if number % 7 == 0:
            flows.forget(now)


def test_clients_who_may_begin_again_are_forgotten() -> None:
    flows = NewFlows()
    for number in range(10_000):
        flows.began(number.to_bytes(4), 10, number / 1000)
        flows.forget(number / 1000)
        assert len(flows._paid_until) <= 102
    flows.forget(11)

    assert len(flows._paid_until) == 0


# Who was refused


def test_those_who_were_refused_most_come_first_with_their_reasons() -> None:
    refused = Refused()
    for client, reason, times in ((C, "table_full", 2), (D, "client_full", 3), (C, "no_port", 2)):
        for _ in range(times):
            refused.saw(client, reason)

    assert list(refused.top().items()) == [
        (C, {"table_full": 2, "no_port": 2}),
        (D, {"client_full": 3}),
    ]
    assert list(refused.top(1)) == [C]
    assert Refused().top() == {}


@given(seen=st.lists(st.integers(0, 9) | st.integers(0, 2**32 - 1), max_size=300))
def test_a_count_is_too_low_by_a_share_of_all_at_most(seen: list[int]) -> None:
    refused, exact = Refused(most=8), Counter[bytes]()
    for number in seen:
        refused.saw(number.to_bytes(4), "client_full")
        exact[number.to_bytes(4)] += 1

    counts = {client: reasons["client_full"] for client, reasons in refused.top(99).items()}
    assert len(counts) <= 8
    for client, count in exact.items():
        assert count - len(seen) / 9 <= counts.get(client, 0) <= count


def test_a_client_among_a_flood_of_forged_ones_is_found() -> None:
    refused, rng = Refused(), Random(7)
    for number in range(200_000):
        refused.saw(C if number % 100 == 0 else rng.randbytes(4), "table_full")

    assert next(iter(refused.top())) == C
    assert len(refused._counts) <= 512


# Who makes room


@pytest.fixture
def nat() -> NatTable:
    return NatTable(rng=Random(1))


def spare() -> Spare:
    return Spare(attrgetter("is_tentative"), attrgetter("is_conversation"))


def rows(nat: NatTable, count: int) -> list[Row]:
    """Half-open connections, a second between each and the next."""
    return [
        nat.open_tcp(at(f"C:{5000 + n}"), at("K:80"), at("S:80"), Source.CLIENT, 16000, n)
        for n in range(count)
    ]


def test_the_oldest_row_is_spared_first_and_none_before_its_time(nat: NatTable) -> None:
    tentative = spare()
    first, second = rows(nat, 2)
    for row in (first, second):
        tentative.add(row, row.created_at)

    assert tentative.oldest(EARLY - 0.1) is None
    assert tentative.oldest(EARLY) is first
    assert tentative.oldest(EARLY) is first, "until it is taken out"
    tentative.discard(first)
    tentative.discard(first)
    assert tentative.oldest(EARLY + 0.9) is None
    assert tentative.oldest(EARLY + 1) is second


def test_a_row_that_was_heard_of_lately_goes_to_the_end(nat: NatTable) -> None:
    tentative = spare()
    first, second = rows(nat, 2)
    for row in (first, second):
        tentative.add(row, row.created_at)
    first.rewrites[min(first.rewrites)].seen_at = 9

    assert tentative.oldest(10) is second
    tentative.discard(second)
    assert tentative.oldest(10) is None
    assert tentative.oldest(10 + EARLY) is first


def test_rows_that_have_become_conversations_leave_a_few_at_a_time(nat: NatTable) -> None:
    tentative = spare()
    all_rows = rows(nat, 2 * LOOKS + 1)
    for row in all_rows:
        tentative.add(row, 0)
        row.accepted = row is not all_rows[-1]

    assert tentative.oldest(1000) is None
    assert tentative.oldest(1000) is None
    assert tentative.oldest(1000) is all_rows[-1]
    assert len(tentative) == 1


def test_each_client_has_an_oldest_row_of_its_own(nat: NatTable) -> None:
    tentative = spare()
    first, second = (
        nat.open_tcp(at(f"{host}:5000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 0)
        for host in "CD"
    )
    for row in (first, second):
        tentative.add(row, 0)

    assert [tentative.oldest(9, row.client.addr) for row in (first, second)] == [first, second]
    tentative.discard(second)
    assert tentative.oldest(9, second.client.addr) is None
    assert len(tentative._of) == len(tentative) == 1
