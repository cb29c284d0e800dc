"""A week of krelay's ticks on a clock of its own: nothing grows, and nothing is for the collector.

The days are alike: conversations begin, go on, end and are forgotten, with a tcp-relay that comes
and goes, a limit that is reached and settings that change.  So whatever is counted at the end of
the last day is no more than at the end of the second.  Days have eight hours, whole ones with
KRELAY_LONG.
"""

import gc
import os
import sys
from random import Random
from typing import NamedTuple

import pytest

from knet.endpoint import Endpoint, FiveTuple, Proto
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import Timeouts
from krelay.registration.messages import Close, Open, Report
from krelay.steps import Hook
from tests.tools.hours import garbage
from tests.tools.kernel import Datapath
from tests.tools.packets import ACK, FIN, RST, SYN, Template, addr, policy

DAY, EVERY = (86_400, 600) if os.environ.get("KRELAY_LONG") else (28_800, 200)
"""Seconds of a day, and between the times when somebody talks: so that two days use most ports."""
DAYS = 7
PRE, POST = Hook.PREROUTING, Hook.POSTROUTING
RELAY = addr("K")


class Figures(NamedTuple):
    """What there is when a day is over, and nothing lives any more."""

    objects: int
    blocks: int
    flows: int


def figures(path: Datapath) -> Figures:
    """As of now."""
    return Figures(len(gc.get_objects()), sys.getallocatedblocks(), len(path.nat))


class Week:
    """Who talks to a relay, now and then; a tick is each second's."""

    def __init__(self, room: int) -> None:
        self._rng = Random(1)
        self.path = Datapath(policy(), room, FlowLimits(40, 12), 1, 0.0)
        self._relay = self._send
        self._number = 0
        self.rewritten = 0

    def day(self) -> None:
        """One of them; for the last three hours nobody talks."""
        path = self.path
        for second in range(DAY):
            path.now += 1
            path.nat.expire(path.now)
            path.relays.on_time(path.now)
            if second % EVERY == 0 and second < DAY - 3 * 3600:
                for _ in range(self._rng.randrange(30)):
                    self._talk()
                path.nat.timeouts = Timeouts(udp=300 + second // EVERY % 2)
            if second % EVERY == 9:
                path.count(path.offload.due(path.now, 1))
                path.turn()
        if self._rng.random() < 0.5:
            path.relays.lost(self._relay, path.now)

    def _send(self, _: object) -> None:
        """What tcp-relay is told unasked."""

    def _talk(self) -> None:
        rng, path = self._rng, self.path
        host, port = rng.randrange(1, 9), rng.randrange(40000, 40050)
        client = Endpoint(bytes((10, 0, 0, host)), port)
        if rng.random() < 0.5:
            self._packet(PRE, client, Endpoint(RELAY, 53), Proto.UDP)
            self._packet(POST, Endpoint(addr("S"), 53), client, Proto.UDP)
            return
        service = Endpoint(RELAY, 80)
        for flags in (SYN, ACK, *rng.choice(((), (FIN | ACK,), (RST,)))):
            self._packet(PRE, client, service, Proto.TCP, flags)
        self._number += 1
        relay = Endpoint(RELAY, 45000 + self._number % 999)
        path.relays.handle(Open(self._number, client, 16000, relay), self._relay, path.now)
        path.relays.handle(Report("abcd", {"accepted": self._number}), self._relay, path.now)
        path.turn()
        self._packet(POST, relay, Endpoint(addr("S"), 80), Proto.TCP, SYN)
        self._packet(PRE, Endpoint(addr("S"), 80), Endpoint(client.addr, relay.port), Proto.TCP)
        if rng.random() < 0.8:
            path.relays.handle(Close(relay), self._relay, path.now)
            path.turn()

    def _packet(
        self, hook: Hook, src: Endpoint, dst: Endpoint, proto: Proto, flags: int = ACK
    ) -> None:
        got = self.path.packet(Template(FiveTuple(proto, src, dst), b"data", flags), hook)
        self.rewritten += isinstance(got, bytes)
        self.path.worker.answers.clear()


@pytest.mark.parametrize("room", [0, 64], ids=["queue", "auto"])
def test_a_week_of_ticks_leaves_as_much_as_two_days(room: int) -> None:
    week = Week(room)
    after: list[Figures] = []

    def days() -> None:
        for _ in range(DAYS):
            week.day()
            after.append(figures(week.path))

    left = garbage(days)

    assert left == {}
    assert week.rewritten > 5000
    assert len(after) == DAYS
    second, last = after[1], after[-1]
    assert last.flows <= second.flows + 2
    assert last.objects <= second.objects + 100
    assert last.blocks <= second.blocks + 500
