"""The queue against the real kernel: whole packets, bounded batches, a verdict for each packet."""

import logging
import select
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from ipaddress import IPv4Address
from pathlib import Path
from random import Random

import pytest
from netfilterqueue import NetfilterQueue

from krelay.datapath import nfqueue
from krelay.datapath.nfqueue import Queue, QueueUnavailable, figures
from krelay.datapath.verdict import Verdict
from krelay.datapath.worker import Worker
from krelay.host.netfilter import probe
from krelay.nat.table import NatTable
from krelay.rules.spec import RuleSpec
from krelay_vm import Lab

pytestmark = pytest.mark.net

NUMBER = 77
PORT = 5000
RULES = RuleSpec(
    name="krelay-test",
    queue=NUMBER,
    tcp=(),
    udp=((PORT, PORT),),
    gports=(16000,),
    servers=(IPv4Address("192.168.0.1"),),
    relay_clients=(),
)


class Scripted(Worker):
    """A worker that says what it is told to and keeps what it was given."""

    def __init__(self) -> None:
        super().__init__(NatTable(rng=Random(1)))
        self.packets: list[bytes] = []
        self.says: list[Callable[[bytes], bytes] | Verdict | Exception] = []

    def handle(self, packet: bytes, hook: int, now: float) -> bytes | Verdict:
        self.packets.append(packet)
        said = self.says.pop(0) if self.says else Verdict.PASS
        if isinstance(said, Exception):
            raise said
        return said if isinstance(said, Verdict) else said(packet)


class Ends:
    """A sender on the client host, and on the relay the receiver whose packets are queued."""

    def __init__(self, lab: Lab) -> None:
        with lab.enter("client"):
            self.sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.sender.connect((lab.address("relay", "client"), PORT))
        with lab.enter("relay"):
            self.receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self.receiver.bind(("0.0.0.0", PORT))
            self.receiver.settimeout(30)
        self.lab = lab

    def waiting(self) -> int:
        """Packets in the kernel's queue."""
        with self.lab.enter("relay"):
            served = figures(NUMBER)
        return served.waiting if served else 0

    def close(self) -> None:
        self.sender.close()
        self.receiver.close()


@pytest.fixture
def ends() -> Iterator[Ends]:
    with Lab() as lab:
        with lab.enter("relay"):
            probe().install(RULES)
        with closing(Ends(lab)) as both:
            yield both


def bound(
    ends: Ends, worker: Worker, before_verdicts: Callable[[], object] = lambda: None
) -> Queue:
    with ends.lab.enter("relay"):
        return Queue(NUMBER, worker, lambda packet: None, before_verdicts=before_verdicts)


def serve(queue: Queue) -> None:
    """One turn, as soon as there is something."""
    assert select.select([queue], [], [], 5)[0]
    queue.serve()


def test_a_datagram_of_60000_bytes_is_handed_over_and_goes_on_whole(ends: Ends) -> None:
    worker = Scripted()
    content = Random(1).randbytes(60_000)
    with closing(bound(ends, worker)) as queue:
        ends.sender.send(content)
        serve(queue)

        assert ends.receiver.recv(1 << 16) == content
    assert [len(packet) for packet in worker.packets] == [60_028]


def test_a_rewritten_packet_leaves_as_its_new_bytes(ends: Ends) -> None:
    worker = Scripted()
    worker.says = [lambda packet: packet[:26] + b"\0\0" + b"two"]  # without a checksum
    with closing(bound(ends, worker)) as queue:
        ends.sender.send(b"one")
        serve(queue)

        assert ends.receiver.recv(100) == b"two"


def test_who_wants_to_know_is_told_before_packets_go_on(ends: Ends) -> None:
    gone_on: list[int] = []

    def look() -> None:
        gone_on.append(len(select.select([ends.receiver], [], [], 0)[0]))

    with closing(bound(ends, Scripted(), look)) as queue:
        for number in range(2):
            ends.sender.send(b"one")
            serve(queue)
            assert ends.receiver.recv(100) == b"one"
            assert gone_on == [0] * (number + 1)


def test_a_fault_of_ours_drops_its_packet_and_no_other(
    ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    worker = Scripted()
    worker.says = [KeyError("ours"), KeyError("ours"), Verdict.PASS]
    with closing(bound(ends, worker)) as queue, caplog.at_level(logging.ERROR, logger="krelay"):
        for content in (b"first", b"second", b"third"):
            ends.sender.send(content)
        while len(worker.packets) < 3:
            serve(queue)

        assert ends.receiver.recv(100) == b"third"
        assert queue.errors == 2
        assert ends.waiting() == 0
    assert len([r for r in caplog.records if "fault of ours" in r.getMessage()]) == 1


def test_a_turn_handles_a_batch_and_leaves_the_rest(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nfqueue, "BATCH", 5)
    worker = Scripted()
    with closing(bound(ends, worker)) as queue:
        for number in range(12):
            ends.sender.send(bytes((number,)))
        turns = []
        while len(worker.packets) < 12:
            before = len(worker.packets)
            serve(queue)
            turns.append(len(worker.packets) - before)

        assert max(turns) == 5
        assert [ends.receiver.recv(1)[0] for _ in range(12)] == list(range(12))


def test_a_queue_that_is_served_is_refused_with_what_to_do(ends: Ends) -> None:
    with (
        closing(bound(ends, Scripted())),
        pytest.raises(QueueUnavailable, match="choose another with --queue-num"),
    ):
        bound(ends, Scripted())


def test_a_kernel_that_has_the_queue_as_a_module_loads_it_when_it_is_bound(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Seen on Debian's kernel: there is no file of figures until somebody has asked for a queue.
    there = tmp_path / "figures"

    def loading() -> NetfilterQueue:
        there.symlink_to("/proc/thread-self/net/netfilter/nfnetlink_queue")
        return NetfilterQueue()

    monkeypatch.setattr(nfqueue, "_FIGURES", there)
    monkeypatch.setattr(nfqueue, "NetfilterQueue", loading)

    bound(ends, Scripted()).close()


def test_a_kernel_without_the_queue_is_told(
    ends: Ends, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refused() -> None:
        raise OSError("Failed to create queue")

    monkeypatch.setattr(nfqueue, "_FIGURES", tmp_path / "not there")
    monkeypatch.setattr(nfqueue, "NetfilterQueue", refused)

    with pytest.raises(QueueUnavailable, match="modprobe nfnetlink_queue"):
        bound(ends, Scripted())


def test_what_the_queue_could_not_hold_is_counted(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nfqueue, "MAX_QUEUED", 8)
    with closing(bound(ends, Scripted())):
        for _ in range(20):
            ends.sender.send(b"x")
        with ends.lab.enter("relay"):
            served = figures(NUMBER)

        assert served is not None
        assert (served.waiting, served.queue_dropped) == (8, 12)


def test_closing_leaves_no_packet_and_no_queue(ends: Ends) -> None:
    queue = bound(ends, Scripted())
    ends.sender.send(b"x")
    assert ends.waiting() == 1
    queue.close()
    queue.close()

    with ends.lab.enter("relay"):
        assert figures(NUMBER) is None
    with closing(bound(ends, Scripted())):
        assert ends.waiting() == 0
