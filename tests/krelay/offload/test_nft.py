"""Sets and counters of the rules in a real kernel: what it has learnt is told."""

import errno
import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing
from ipaddress import IPv4Address, IPv4Network
from typing import Any

import pytest

from knet.endpoint import Endpoint, Proto
from knet.rules.watch import RuleWatcher
from knet.sockbuf import Direction, enlarge
from krelay.host.netfilter import Nft
from krelay.offload import nft as nftbackend
from krelay.offload.backend import OffloadLost
from krelay.offload.nft import NftSets
from krelay.rules.dnslearning import LEARNT
from krelay.rules.spec import Learning, RuleSpec
from krelay.steps import Step
from krelay_vm import Lab

pytestmark = pytest.mark.net

NAME = "krelay-test"
ROOM = 5_000
GPORT = 16000
BESIDE = IPv4Network("192.0.2.0/24")


class Host:
    """A lab in whose relay host this thread is, and the sets of its rules."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.relay = lab.address("relay", towards="server")
        self.server = IPv4Address(lab.address("server"))
        self.client = lab.address("client")
        learning = Learning(self.server, (IPv4Address(self.relay),), (BESIDE,))
        spec = RuleSpec(
            name=NAME, queue=77, tcp=((80, 80),), udp=((53, 53),), gports=(GPORT,),
            servers=(self.server,), relay_clients=(), room=ROOM, lets_offloaded_pass=True,
            learning=learning,
        )  # fmt: skip
        Nft(with_xt=True).install(spec)
        self.sets = NftSets(NAME)

    def learn(self, port: int, *, at: str = LEARNT[0]) -> None:
        """The kernel has a query from that port of the client's, as if it had learnt it."""
        nft("add", "element", "ip", NAME, at, f"{{ {self.client} . {port} }}")

    def learnt(self, port: int) -> str | None:
        return self.sets.learnt(LEARNT[:2], Endpoint.of(self.client, port).addr, port.to_bytes(2))


@pytest.fixture
def host() -> Iterator[Host]:
    with Lab() as lab, lab.enter("relay"):
        host = Host(lab)
        yield host
        host.sets.close()


def nft(*words: str) -> None:
    subprocess.run(["nft", *words], check=True)


def test_the_set_is_told_that_has_a_query(host: Host) -> None:
    host.learn(4000)
    host.learn(4001, at=LEARNT[1])
    assert [host.learnt(port) for port in (4000, 4001, 4002)] == [LEARNT[0], LEARNT[1], None]
    nft("flush", "set", "ip", NAME, LEARNT[0])
    assert [host.learnt(port) for port in (4000, 4001)] == [None, LEARNT[1]]
    nft("flush", "ruleset")
    assert host.learnt(4001) is None  # what isn't there has learnt nothing


def test_with_small_buffers_as_much_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a user namespace, where net.core.rmem_max holds."""

    def granted(sock: socket.socket, direction: Direction, _: int) -> int:
        return enlarge(sock, direction, 16 << 10)

    monkeypatch.setattr(nftbackend, "enlarge", granted)
    host.learn(4000)
    host.sets.close()
    host.sets = NftSets(NAME)
    assert host.learnt(4000) == LEARNT[0]
    assert host.sets.totals()


class FailingOnce:
    """A socket of which one method fails, the first time, without having done anything."""

    def __init__(self, sets: NftSets, method: str, number: int) -> None:
        self._socket, self._method, self._number = sets._socket, method, number

    def __getattr__(self, name: str) -> Any:
        if name != self._method:
            return getattr(self._socket, name)
        self._method = ""
        return self._fails

    def _fails(self, *_: object) -> None:
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize("method", ["send", "recv"])
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EIO, errno.EPERM, errno.EMFILE])
def test_a_call_that_fails_once_loses_nothing(host: Host, method: str, number: int) -> None:
    host.learn(4000)
    kernel = host.sets._socket
    host.sets._socket = FailingOnce(host.sets, method, number)  # type: ignore[assignment]
    assert host.learnt(4000) == LEARNT[0]
    host.sets._socket = kernel
    host.sets._socket = FailingOnce(host.sets, method, number)  # type: ignore[assignment]
    assert host.sets.totals() is not None
    host.sets._socket = kernel


def test_answers_that_the_kernel_had_no_room_for_are_lost(host: Host) -> None:
    kernel = host.sets._socket
    host.sets._socket = FailingOnce(host.sets, "recv", errno.ENOBUFS)  # type: ignore[assignment]
    with pytest.raises(OffloadLost):
        host.learnt(4000)
    host.sets._socket = kernel


def test_what_the_rules_have_rewritten_themselves_is_told_by_step(host: Host) -> None:
    totals = host.sets.totals()
    assert totals
    assert {proto for proto, _ in totals} == {Proto.UDP}
    assert set(totals.values()) == {0}
    assert {step for _, step in totals} <= {Step.U12, Step.U34}
    nft("flush", "ruleset")
    assert host.sets.totals() == {}


def announced(watcher: RuleWatcher, act: Callable[[], object]) -> bool:
    """Whether the kernel announces what this does."""
    watcher.drain()
    act()
    return bool(select.select([watcher], [], [], 0.2)[0])


def test_what_others_change_is_announced(host: Host) -> None:
    with closing(RuleWatcher()) as watcher:
        watcher.ignore(host.sets.port)
        assert not announced(watcher, lambda: host.learnt(4000))
        assert not announced(watcher, host.sets.totals)
        assert announced(watcher, lambda: host.learn(4000))
        assert announced(watcher, lambda: nft("flush", "chain", "ip", NAME, "pre-udp"))
        nft("flush", "chain", "ip", NAME, "pre")
        assert watcher.drain() == frozenset({NAME})
