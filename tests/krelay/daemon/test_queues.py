"""The two queues: what each has, what is told of losses, and when one is given up."""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random

import pytest

from knet.log import Failures, Log
from krelay.daemon import queues
from krelay.daemon.queues import MAX_OPENINGS, MOST_FAILURES, OPENINGS_AT_ONCE, Queues
from krelay.datapath.nfqueue import Figures, QueueUnavailable
from krelay.datapath.worker import Worker
from krelay.nat.table import NatTable
from krelay.rules.spec import openings
from tests.tools.logs import complaints, fields
from tests.tools.stepped import SteppedLoop

NUMBER = 1600
OVERFLOWED = "the queue overflowed: packets dropped by the kernel"
UNREADABLE = "the queue can't be read; trying again"


def failure(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@dataclass
class Kernel:
    """The queues of the kernel."""

    made: list["FakeQueue"] = field(default_factory=list)
    taken: set[int] = field(default_factory=set)
    figures: dict[int, Figures] = field(default_factory=dict)

    def queue(self, number: int, worker: Worker, send: object, **options: object) -> "FakeQueue":
        if number in self.taken:
            raise QueueUnavailable("taken")
        self.made.append(FakeQueue(number, options, 100 + len(self.made)))
        return self.made[-1]


@dataclass
class FakeQueue:
    """A queue that is bound until `close`."""

    number: int
    options: dict[str, object]
    descriptor: int
    fails: OSError | None = None
    fails_to_close: OSError | None = None
    is_closed: bool = False
    on_serve: Callable[[], object] = lambda: None

    def fileno(self) -> int:
        return self.descriptor

    def serve(self) -> None:
        self.on_serve()
        if self.fails is not None:
            raise self.fails

    def close(self) -> None:
        self.is_closed = True
        if self.fails_to_close is not None:
            raise self.fails_to_close


class Rig:
    """Both queues, and what is told of them."""

    def __init__(self, loop: SteppedLoop) -> None:
        self.loop = loop
        self.lost: list[str] = []
        self.queues = Queues(
            loop,
            NUMBER,
            Worker(NatTable(rng=Random(1))),
            send=lambda packet: None,
            before_verdicts=self.before_verdicts,
            lost=self.lost.append,
            failures=Failures(Log("relaying")),
        )

    def before_verdicts(self) -> None:
        """Only its identity matters."""

    def serve(self, queue: FakeQueue, times: int = 1) -> None:
        for _ in range(times):
            self.loop.handlers[queue.descriptor](1)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel()
    monkeypatch.setattr(queues, "Queue", kernel.queue)
    monkeypatch.setattr(queues, "figures", kernel.figures.get)
    monkeypatch.setattr(queues, "PAUSE", 0)
    return kernel


@pytest.fixture
def rig(kernel: Kernel) -> Iterator[Rig]:
    with SteppedLoop() as loop:
        yield Rig(loop)


def test_openings_have_a_short_queue_and_short_turns(kernel: Kernel, rig: Rig) -> None:
    rig.queues.bind()

    usual, opening = kernel.made
    assert (usual.number, opening.number) == (NUMBER, openings(NUMBER))
    assert usual.options.keys() == {"clock"}
    assert opening.options["most"] == MAX_OPENINGS
    assert opening.options["batch"] == OPENINGS_AT_ONCE
    assert opening.options["before_verdicts"] == rig.before_verdicts
    assert rig.loop.handlers.keys() == {usual.descriptor, opening.descriptor}


def test_a_second_queue_that_is_taken_leaves_the_first_to_be_closed(
    kernel: Kernel, rig: Rig
) -> None:
    kernel.taken.add(openings(NUMBER))
    with pytest.raises(QueueUnavailable):
        rig.queues.bind()
    assert len(rig.queues.bound) == 1

    rig.queues.close()

    assert kernel.made[0].is_closed
    assert rig.loop.handlers == {}


def test_both_are_closed_though_one_fails_and_its_failure_is_told(
    kernel: Kernel, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.queues.bind()
    kernel.made[0].fails_to_close = failure(errno.ENOBUFS)

    rig.queues.close()

    assert [queue.is_closed for queue in kernel.made] == [True, True]
    assert (rig.queues.bound, rig.loop.handlers) == ([], {})
    assert complaints(caplog) == ["a call failed; going on"]


def test_losses_of_both_are_added_and_known_while_the_kernel_is_silent(
    kernel: Kernel, rig: Rig
) -> None:
    rig.queues.bind()
    assert (rig.queues.dropped(), rig.queues.waiting) == ((0, 0), 0)
    kernel.figures[NUMBER] = Figures(1, 3, 0xFFFF, 10, 1)
    kernel.figures[openings(NUMBER)] = Figures(1, 4, 0xFFFF, 20, 2)
    assert (rig.queues.dropped(), rig.queues.waiting) == ((30, 3), 7)

    kernel.figures.clear()
    assert (rig.queues.dropped(), rig.queues.waiting) == ((30, 3), 0)

    rig.queues.close()
    rig.queues.bind()
    assert rig.queues.dropped() == (0, 0)


def test_an_overflow_is_told_once_and_no_packet_is_left_out(
    kernel: Kernel, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.queues.bind()
    rig.queues.warn(0)
    for now, dropped in ((1, 5), (2, 5), (3, 7), (12, 9), (13, 9)):
        kernel.figures[NUMBER] = Figures(1, 0, 0xFFFF, dropped, 0)
        rig.queues.warn(now)

    told = [(each["packets"], each["in_all"]) for each in fields(caplog, OVERFLOWED)]
    assert told == [(5, 5), (4, 9)]


def test_a_queue_is_given_up_after_many_failures_in_a_row(
    kernel: Kernel, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.queues.bind()
    queue = kernel.made[0]
    queue.fails = failure(errno.ENOMEM)
    rig.serve(queue, MOST_FAILURES)
    queue.fails = None
    rig.serve(queue)
    queue.fails = failure(errno.ENOMEM)
    rig.serve(queue, MOST_FAILURES)
    assert rig.lost == []
    assert complaints(caplog) == [UNREADABLE]  # the same one, within seconds

    rig.serve(queue)

    assert rig.lost == ["the queue is lost: [Errno 12] Cannot allocate memory"]


def test_a_queue_that_was_closed_while_it_was_served_is_not_told_of(
    kernel: Kernel, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.queues.bind()
    queue = kernel.made[0]
    queue.on_serve, queue.fails = rig.queues.close, failure(errno.EBADF)

    rig.serve(queue)

    assert (rig.lost, complaints(caplog)) == ([], [])
