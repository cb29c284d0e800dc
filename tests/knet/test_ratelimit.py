"""Limits of rates and who was refused: against slow twins, and bounded whatever is forged."""

from collections import Counter
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from knet.ratelimit import PerClientLimiter, RateLimiter, TopRefusedClients

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
def test_a_rate_limiter_is_a_bucket_of_tokens(gaps: list[float], rate: int, burst: int) -> None:
    limiter, twin, now = RateLimiter(rate, burst), Bucket(rate, burst), 100.0
    twin.at = now
    for gap in gaps:
        now += gap
        assert limiter.admits(now) is twin.admits(now)


@given(gaps=gaps, rate=st.sampled_from((1, 2, 8, 1000)))
def test_a_per_client_limiter_is_a_bucket_for_each_client(gaps: list[float], rate: int) -> None:
    limiter, twins, now = PerClientLimiter(), {C: Bucket(rate, rate), D: Bucket(rate, rate)}, 0.0
    for number, gap in enumerate(gaps):
        now += gap
        client = (C, C, D)[number % 3]
        admitted = limiter.admits(client, rate, now)
        assert admitted is twins[client].admits(now)
        if admitted:
            limiter.began(client, rate, now)
        if number % 7 == 0:
            limiter.forget(now)


def test_clients_who_may_begin_again_are_forgotten() -> None:
    limiter = PerClientLimiter()
    for number in range(10_000):
        limiter.began(number.to_bytes(4), 10, number / 1000)
        limiter.forget(number / 1000)
        assert len(limiter._paid_until) <= 102
    limiter.forget(11)

    assert len(limiter._paid_until) == 0


# Refused clients


def test_those_who_were_refused_most_come_first_with_their_reasons() -> None:
    refused = TopRefusedClients()
    for client, reason, times in ((C, "table_full", 2), (D, "client_full", 3), (C, "no_port", 2)):
        for _ in range(times):
            refused.saw(client, reason)

    assert list(refused.top().items()) == [
        (C, {"table_full": 2, "no_port": 2}),
        (D, {"client_full": 3}),
    ]
    assert list(refused.top(1)) == [C]
    assert TopRefusedClients().top() == {}


@given(seen=st.lists(st.integers(0, 9) | st.integers(0, 2**32 - 1), max_size=300))
def test_a_count_is_too_low_by_a_share_of_all_at_most(seen: list[int]) -> None:
    refused, exact = TopRefusedClients(most=8), Counter[bytes]()
    for number in seen:
        refused.saw(number.to_bytes(4), "client_full")
        exact[number.to_bytes(4)] += 1

    counts = {client: reasons["client_full"] for client, reasons in refused.top(99).items()}
    assert len(counts) <= 8
    for client, count in exact.items():
        assert count - len(seen) / 9 <= counts.get(client, 0) <= count


def test_a_client_among_a_flood_of_forged_ones_is_found() -> None:
    refused, rng = TopRefusedClients(), Random(7)
    for number in range(200_000):
        refused.saw(C if number % 100 == 0 else rng.randbytes(4), "table_full")

    assert next(iter(refused.top())) == C
    assert len(refused._counts) <= 512
