"""The port wait queue: whose turn it is, and when."""

import logging

import pytest

from knet.loop import Loop
from tcp_relay.engine import portqueue as module
from tcp_relay.engine.portqueue import PortWaitQueue
from tests.tcp_relay.helpers import run_for, run_until


class Rig:
    """`ports`: how many of those who try find one."""

    def __init__(self, loop: Loop) -> None:
        self.queue = PortWaitQueue(loop, "more ports")
        self.ports = 0
        self.tried: list[str] = []
        self.served: list[str] = []

    def join(self, name: str) -> None:
        self.queue.join(lambda: self.retry(name))

    def retry(self, name: str) -> None:
        self.tried.append(name)
        if self.ports:
            self.ports -= 1
            self.served.append(name)
        else:
            self.join(name)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY", 0.005)


def test_only_the_first_tries_and_keeps_its_place() -> None:
    with Loop() as loop:
        rig = Rig(loop)
        for name in "abc":
            rig.join(name)
        run_until(loop, lambda: len(rig.tried) >= 4)
        assert set(rig.tried) == {"a"}
        assert len(rig.queue) == 3


def test_they_are_served_in_the_order_they_came() -> None:
    with Loop() as loop:
        rig = Rig(loop)
        for name in "abcde":
            rig.join(name)
        run_until(loop, lambda: bool(rig.tried))
        rig.ports = 3  # for three at once: no pause between
        tried = len(rig.tried)
        run_until(loop, lambda: len(rig.served) == 3)
        assert rig.tried[tried:][:4] == ["a", "b", "c", "d"]
        rig.join("f")
        rig.ports = 9
        run_until(loop, lambda: not rig.queue)
        assert rig.served == ["a", "b", "c", "d", "e", "f"]


def test_an_empty_queue_costs_nothing() -> None:
    with Loop() as loop:
        rig = Rig(loop)
        rig.ports = 1
        rig.join("a")
        run_until(loop, lambda: not rig.queue)
        tried = len(rig.tried)
        run_for(loop, 0.03)
        assert len(rig.tried) == tried
        assert not loop._timers


def test_it_is_said_once_and_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("krelay.portqueue")
    logger.addHandler(caplog.handler)
    with Loop() as loop:
        rig = Rig(loop)
        for name in "abc":
            rig.join(name)
        run_until(loop, lambda: len(rig.tried) >= 3)
    logger.removeHandler(caplog.handler)
    said = {id(record): record for record in caplog.records}
    [record] = said.values()
    assert record.getMessage() == "no local port is free"
    assert record.fields["fix"] == "more ports"  # type: ignore[attr-defined]
