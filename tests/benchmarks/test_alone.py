"""The relay host has a core to itself for as long as it is wanted, and everything is as before."""

import os
import sys
import time
from collections.abc import Iterator

import pytest

from benchmarks import alone, ground, paths, processes
from krelay_vm import Lab, LabError

pytestmark = pytest.mark.serial

_SHOW = "mount -t sysfs sysfs /sys && cat /sys/class/net/eth*/queues/rx-*/rps_cpus"


@pytest.fixture
def lab() -> Iterator[Lab]:
    if why := alone.impossible():
        pytest.skip(why)
    with Lab() as lab:
        yield lab


def steering(lab: Lab, host: str) -> set[int]:
    """The cores that deal with the packets of the host's interfaces, as bits."""
    shown = lab.run(host, "unshare", "--mount", "sh", "-c", _SHOW).stdout
    return {int(line.replace(",", ""), 16) for line in shown.split()}


@pytest.mark.net
def test_programs_and_packets_are_moved_and_moved_back(lab: Lab) -> None:
    rest, relay = ground.cores()
    before = os.sched_getaffinity(0)
    inside, outside = (lab.start(host, "sleep", "60") for host in ("relay", "client"))
    with alone.relay_alone(lab):
        assert os.sched_getaffinity(inside.pid) == {relay}
        assert os.sched_getaffinity(outside.pid) == os.sched_getaffinity(0) == {rest}
        assert steering(lab, "relay") == {1 << relay}
        assert steering(lab, "client") == steering(lab, "server") == {1 << rest}
    for pid in (0, inside.pid, outside.pid):
        assert os.sched_getaffinity(pid) == before
    for host in lab.topology.names:
        assert steering(lab, host) == {0}


@pytest.mark.net
def test_all_is_moved_back_after_an_error(lab: Lab) -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(LabError), alone.relay_alone(lab):
        lab.run("relay", "false")
    assert os.sched_getaffinity(0) == before
    assert steering(lab, "relay") == {0}


@pytest.mark.net
def test_what_the_relay_host_does_is_on_the_meter_and_the_daemons_time_is_in_it(lab: Lab) -> None:
    to = paths.prepare(lab, ground.QUEUE, ground.SERVICE_PORT)
    ground.check_udp(lab, to)
    ground.discard_at_server(lab)
    daemon = [lab.programs[-1]]
    with alone.relay_alone(lab) as meter:
        used, spent = processes.cpu_seconds(daemon), meter()
        passed = ground.send_one(lab, to, 1.0, meter, pace=20_000)
        used, spent = processes.cpu_seconds(daemon) - used, meter() - spent
    assert 0 < passed.spent <= passed.seconds + 0.05
    assert passed.spent <= spent
    assert spent > used * 0.8  # both go by ticks


@pytest.mark.net
def test_a_core_that_does_nothing_else_is_busy_all_the_time(lab: Lab) -> None:
    lab.start("relay", sys.executable, "-c", "while True: pass")
    with alone.relay_alone(lab) as meter:
        began, spent = time.monotonic(), meter()
        time.sleep(0.5)
        took, spent = time.monotonic() - began, meter() - spent
    assert spent == pytest.approx(took, abs=0.1)
