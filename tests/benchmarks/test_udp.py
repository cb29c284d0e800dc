"""The ways that UDP takes are seen to work; what is read of them fits the goals."""

import pytest

from benchmarks import ground, paths, udp
from benchmarks.ground import CannotMeasure, parse_visits
from krelay_vm import Lab

QUEUES = """\
  16000   1234     0 2 65535     0     0     4711  1
  16001   1234     7 2 65535     3     0      289  1
"""


def test_visits_are_counted_over_all_queues() -> None:
    assert parse_visits(QUEUES) == 5000
    assert parse_visits("") == 0


def test_goals_name_series_that_are_measured() -> None:
    measured = {
        name.format(way, size)
        for name in (udp.ONE, udp.FLOOD, udp.COST)
        for way in paths.WAYS
        for size in udp.SIZES
    }
    for goal in udp.GOALS:
        assert {goal.above, goal.below} <= measured


@pytest.mark.net
@pytest.mark.usefixtures("briefly")
@pytest.mark.parametrize("way", paths.WAYS)
def test_packets_of_each_size_come_through_on_each_way(way: str) -> None:
    with Lab() as lab:
        to = paths.prepare(lab, way, ground.SERVICE_PORT)
        ground.check_udp(lab, to)
        ground.discard_at_server(lab)
        for size in udp.SIZES:
            before = server_bytes(lab), ground.received(lab)
            assert ground.rate_of(lab, to, 0.1, size=size) > 0
            came = server_bytes(lab) - before[0], ground.received(lab) - before[1]
            assert came[0] / came[1] == pytest.approx(size + 14, rel=0.01)  # and Ethernet's header


def server_bytes(lab: Lab) -> int:
    """Bytes that the server's interface has received."""
    with lab.enter("server"), open("/proc/thread-self/net/dev") as file:
        [line] = [line for line in file if line.strip().startswith("eth0:")]
    return int(line.partition(":")[2].split()[0])


@pytest.mark.net
@pytest.mark.serial
@pytest.mark.usefixtures("briefly")
def test_a_paced_sender_keeps_to_its_pace() -> None:
    with Lab() as lab:
        to = paths.prepare(lab, paths.FORWARD, ground.SERVICE_PORT)
        ground.check_udp(lab, to)
        ground.discard_at_server(lab)
        passed = ground.send_one(lab, to, 1.0, pace=500)
        assert 0 < passed.packets <= 600
        assert passed.spent == pytest.approx(passed.seconds, abs=0.1)


@pytest.mark.net
def test_packets_through_the_queue_are_counted_as_visits() -> None:
    with Lab() as lab:
        to = paths.prepare(lab, ground.QUEUE, ground.SERVICE_PORT)
        before = ground.queue_visits(lab)
        ground.check_udp(lab, to)
        assert ground.queue_visits(lab) == before + 1


@pytest.mark.net
def test_a_way_that_loses_the_client_is_not_measured() -> None:
    with Lab() as lab:
        to = paths.prepare(lab, paths.DNAT, ground.SERVICE_PORT)
        masquerade = ("-t", "nat", "-A", "POSTROUTING", "-p", "udp", "-j", "MASQUERADE")
        lab.run("relay", "iptables", *masquerade)
        with pytest.raises(CannotMeasure, match=r"from \('192\.168\.0\.2'"):
            ground.check_udp(lab, to)
