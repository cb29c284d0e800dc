"""Flows are set up one by one, lost ones are told, and goals fit what is measured."""

import os

import pytest

from benchmarks import flows, ground, paths
from benchmarks.ground import CannotMeasure, Progress, Wish
from krelay_vm import Lab

MANY = 3000 if os.environ.get("KRELAY_LONG") else 600
SECONDS = 0.1
MEMINFO = """\
MemTotal:        8000000 kB
Slab:              90000 kB
SReclaimable:      40000 kB
SUnreclaim:        50000 kB
VmallocTotal:   34359738367 kB
VmallocUsed:       16000 kB
Percpu:             2000 kB
HugePages_Total:       0
"""


def test_what_the_kernel_keeps_for_itself_is_read_in_bytes() -> None:
    assert flows.parse_meminfo(MEMINFO) == (50_000 + 16_000 + 2_000) * 1024


def test_goals_name_series_that_are_measured() -> None:
    measured = {
        name.format(way, count)
        for name in (flows.ONE, flows.ALL, flows.SET_UP)
        for way in flows.WAYS
        for count in (flows.FEW, flows.MANY)
    }
    for goal in flows.GOALS:
        assert {goal.above, goal.below} <= measured


@pytest.mark.net
@pytest.mark.usefixtures("briefly")
def test_a_round_reads_all_there_is_of_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "FEW", 3)
    monkeypatch.setattr(flows, "MANY", MANY)
    monkeypatch.setattr(flows, "_USE_SECONDS", SECONDS)
    progress = Progress("test")
    flows.measure(Wish(rounds=1, seconds=SECONDS), progress)
    read = {name: values for (name, _), values in progress.readings.items()}
    for way in flows.WAYS:
        assert read[flows.SET_UP.format(way)][0] > 0
        for count in (3, MANY):
            assert read[flows.ONE.format(way, count)][0] > 0
            assert read[flows.ALL.format(way, count)][0] > 0
    for way in ground.DATAPATHS:
        assert read[flows.RSS.format(way)][0] > 0
    for count in (3, MANY):  # more than one where some are lost
        assert read[flows.VISITS.format(ground.QUEUE, count)][0] > 0.99


@pytest.mark.net
def test_packets_that_are_lost_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flows, "_PATIENCE", 0.5)
    with Lab() as lab:
        to = paths.prepare(lab, paths.FORWARD, ground.SERVICE_PORT)
        ground.check_udp(lab, to)
        lab.run("relay", "iptables", "-A", "FORWARD", "-p", "udp", "-j", "DROP")
        with pytest.raises(CannotMeasure, match="packets that set flows up are lost"):
            flows.fill(lab, to, 50)


@pytest.mark.net
def test_as_many_flows_are_set_up_as_are_wanted() -> None:
    with Lab() as lab:
        to = paths.prepare(lab, ground.QUEUE, ground.SERVICE_PORT)
        ground.check_udp(lab, to)
        ground.discard_at_server(lab)
        assert flows.fill(lab, to, 250) > 0
        assert ground.live_flows(ground.root_of(lab)) == 250
