"""What dnsperf prints, read; and that questions come through each way, and are seen when lost."""

import pytest

from benchmarks import dns, ground, paths
from benchmarks.dns import Load, parse_dnsperf
from benchmarks.ground import CannotMeasure, Progress, Wish
from krelay_vm import Lab
from tests.benchmarks.needs import need

FEW = 1000
"""Queries a second, where it isn't measured how many there can be."""
DNSPERF = """\
Statistics:

  Queries sent:         60000
  Queries completed:    59400 (99.00%)
  Queries lost:         600 (1.00%)

  Response codes:       NOERROR 59400 (100.00%)
  Average packet size:  request 34, response 83
  Run time (s):         1.000669
  Queries per second:   59360.288047

  Average Latency (s):  0.000306 (min 0.000015, max 0.005974)
  Latency StdDev (s):   0.000388
"""


def test_answers_a_second_and_the_share_of_lost_questions_are_read() -> None:
    assert parse_dnsperf(DNSPERF) == Load(59360.288047, 1.0)


@pytest.mark.parametrize(
    ("told", "instead"),
    [
        ("NOERROR 59400 (100.00%)", "NOERROR 30609 (51.53%), NXDOMAIN 28791 (48.47%)"),
        ("NOERROR 59400 (100.00%)", "SERVFAIL 59400 (100.00%)"),
        ("completed:    59400", "completed:    0"),
        ("Queries per second:", "Queries:"),
        ("Queries lost:", "Queries:"),
    ],
)
def test_what_is_no_answer_is_not_counted_as_one(told: str, instead: str) -> None:
    with pytest.raises(CannotMeasure, match="dnsperf doesn't tell of answers"):
        parse_dnsperf(DNSPERF.replace(told, instead))


def test_without_its_programs_it_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dns, "NEEDS", ("no-such-server",))
    progress = Progress("test")
    dns.measure(Wish(rounds=1, seconds=1), progress)
    assert "no-such-server" in progress.left_out[-1]
    assert not progress.readings


def test_goals_name_series_that_are_measured() -> None:
    measured = {name.format(way) for name in (dns.NEW, dns.KEPT) for way in paths.WAYS}
    for goal in dns.GOALS:
        assert {goal.above, goal.below} <= measured


@pytest.mark.net
@pytest.mark.usefixtures("briefly")
@pytest.mark.parametrize("way", paths.WAYS)
def test_questions_of_both_kinds_are_answered_on_each_way(way: str) -> None:
    need(*dns.NEEDS)
    with Lab() as lab:
        to = dns.set_up(lab, way)
        for load in (dns.dnsperf(lab, to, 0.3, FEW), dns.new_ports(lab, to, 0.3)):
            assert load.per_second > 0
            assert load.lost < 100


@pytest.mark.net
def test_questions_that_nobody_answers_are_lost() -> None:
    need(*dns.NEEDS)
    with Lab() as lab:
        to = dns.set_up(lab, paths.FORWARD)
        every_tenth = "table ip loss { chain c { type filter hook forward priority 0; udp sport 53 "
        every_tenth += "numgen inc mod 10 == 0 drop; }; }"
        lab.run("relay", "nft", "-f", "-", input=every_tenth)
        assert dns.dnsperf(lab, to, 0.3, FEW).lost > 1
        assert dns.new_ports(lab, to, 1.0).lost > 1


@pytest.mark.net
def test_each_question_is_from_a_port_of_its_own() -> None:
    need(*dns.NEEDS)
    with Lab() as lab:
        to = dns.set_up(lab, ground.QUEUE)
        rows = ground.live_flows(ground.root_of(lab))
        load = dns.new_ports(lab, to, 0.5)
        made = ground.live_flows(ground.root_of(lab)) - rows
        assert made > load.per_second * 0.1
        ground.flows_ended(lab)
