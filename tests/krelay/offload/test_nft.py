"""Maps of flows in a real kernel: written, counted by real packets, read, and withdrawn."""

import errno
import json
import os
import select
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from ipaddress import IPv4Address
from random import Random
from typing import Any

import pytest

from knet.endpoint import Endpoint, Proto, Source
from knet.netlink.nftables import Count
from knet.rules.watch import RuleWatcher
from knet.sockbuf import Direction, enlarge
from krelay.host.netfilter import Nft
from krelay.nat.admission import FlowLimits
from krelay.nat.flow import Flow, Rewrite
from krelay.nat.table import NatTable
from krelay.offload import nft as nftbackend
from krelay.offload.backend import Changes, OffloadLost
from krelay.offload.nft import TOGETHER, NftBackend
from krelay.rules.offloaded import map_name
from krelay.rules.spec import RuleSpec
from krelay.steps import SIDES, Step
from krelay_vm import Lab

pytestmark = pytest.mark.net

NAME = "krelay-test"
ROOM = 10_000
PORT = 53


class Host:
    """A lab in whose relay host this thread is, its rules and maps, and a table of flows."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.relay = lab.address("relay", towards="server")
        self.server = lab.address("server")
        self.client = lab.address("client")
        spec = RuleSpec(
            name=NAME, queue=77, tcp=((80, 80),), udp=((PORT, PORT),), gports=(16000,),
            servers=(IPv4Address(self.server),), relay_clients=(), room=ROOM,
        )  # fmt: skip
        Nft(with_xt=True).install(spec)
        self.nat = NatTable(FlowLimits(ROOM, ROOM), rng=Random(1))
        self.maps = NftBackend(NAME)

    def udp(self, port: int) -> Flow:
        """The flow of a client's port."""
        client, service = Endpoint.of(self.client, port), Endpoint.of(self.relay, PORT)
        server = Endpoint.of(self.server, PORT)
        return self.nat.open_forwarded(Proto.UDP, client, service, server, Source.CLIENT, 0)

    def tcp(self, port: int) -> Flow:
        """The flow of a connection that tcp-relay has accepted."""
        client, service = Endpoint.of(self.client, port), Endpoint.of(self.relay, 80)
        server = Endpoint.of(self.server, 80)
        flow = self.nat.open_tcp(client, service, server, Source.CLIENT, 16000, 0)
        self.nat.attach(flow, Endpoint.of(self.relay, port + 1), 0)
        return flow

    def hand(self, *rewrites: Rewrite) -> None:
        self.maps.change(Changes([], list(rewrites)))

    def withdraw(self, *rewrites: Rewrite) -> list[tuple[Rewrite, Count]]:
        return self.maps.change(Changes(list(rewrites), []))

    def elements(self) -> int:
        """How many there are, as nft shows them."""
        done = subprocess.run(
            ["nft", "-j", "list", "table", "ip", NAME], capture_output=True, text=True, check=True
        )
        entries = json.loads(done.stdout)["nftables"]
        return sum(len(entry["map"].get("elem", ())) for entry in entries if "map" in entry)


@pytest.fixture
def host() -> Iterator[Host]:
    with Lab() as lab, lab.enter("relay"):
        host = Host(lab)
        yield host
        host.maps.close()


def nft(*words: str) -> None:
    subprocess.run(["nft", *words], check=True)


def element(rewrite: Rewrite) -> str:
    """An element's key as nft writes it."""
    src, sport = IPv4Address(rewrite.old[:4]), int.from_bytes(rewrite.old[8:10])
    dst, dport = IPv4Address(rewrite.old[4:8]), int.from_bytes(rewrite.old[10:])
    return f"{{ {src} . {sport} . {dst} . {dport} }}"


def delete(rewrite: Rewrite) -> None:
    """Somebody takes an element out."""
    name = map_name(rewrite.flow.proto, rewrite.step)
    nft("delete", "element", "ip", NAME, name, element(rewrite))


def test_packets_are_rewritten_and_counted_each_way(host: Host) -> None:
    flow, other = host.udp(4000), host.udp(4001)
    there, back = flow.rewrites[Step.U12], flow.rewrites[Step.U34]
    idle = other.rewrites[Step.U12]
    host.hand(there, back, idle)
    with host.lab.enter("client"):
        client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with host.lab.enter("server"):
        server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with client, server:
        client.settimeout(30)
        server.settimeout(30)
        client.bind((host.client, 4000))
        server.bind((host.server, PORT))
        for number in range(3):
            client.sendto(b"q" * 100, (host.relay, PORT))
            data, peer = server.recvfrom(1000)
            assert (data, peer) == (b"q" * 100, (host.client, 4000))
            for _ in range(2):
                server.sendto(b"a" * 300, peer)
                assert client.recvfrom(1000) == (b"a" * 300, (host.relay, PORT)), number

        asked, answered = Count(3, 3 * 128), Count(6, 6 * 328)
        wanted = [(there, asked), (idle, Count(0, 0)), (back, answered)]
        assert list(host.maps.read([there, idle, back])) == wanted
        totals = host.maps.totals()
        assert totals[Proto.UDP, Step.U12] == 3
        assert totals[Proto.UDP, Step.U34] == 6
        assert totals[Proto.TCP, Step.T1] == 0
        assert host.withdraw(idle, there, back) == [wanted[1], wanted[0], wanted[2]]
        assert host.elements() == 0
        client.sendto(b"nobody serves the queue", (host.relay, PORT))
        server.settimeout(0.2)
        with pytest.raises(TimeoutError):
            server.recv(1000)


def test_counts_of_what_is_withdrawn_are_each_its_own(host: Host) -> None:
    """Rewrites whose counts nobody reads are told of by nobody, also between others."""
    flows = [host.tcp(port) for port in range(20000, 20600, 2)]
    rewrites = [rewrite for flow in flows for rewrite in flow.rewrites.values()]
    Random(2).shuffle(rewrites)
    host.hand(*rewrites)
    counts = {rewrite: Count(1 + n, 1000 + n) for n, rewrite in enumerate(rewrites)}
    for at in range(0, len(rewrites), 100):
        subprocess.run(
            ["nft", "-f", "-"], text=True, check=True,
            input="\n".join(
                line for rewrite in rewrites[at : at + 100] for line in counted(rewrite, counts)
            ),
        )  # fmt: skip
    assert len(rewrites) > 2 * TOGETHER

    final = host.withdraw(*rewrites)
    told = [rewrite for rewrite in rewrites if rewrite.step in SIDES]
    assert len(final) == len(told)
    assert dict(final) == {rewrite: counts[rewrite] for rewrite in told}
    assert host.elements() == 0


def test_with_small_buffers_fewer_elements_go_at_a_time(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a user namespace, where net.core.rmem_max holds."""

    def granted(sock: socket.socket, direction: Direction, _: int) -> int:
        return enlarge(sock, direction, 64 << 10)

    monkeypatch.setattr(nftbackend, "enlarge", granted)
    host.maps.renew()
    flows = [host.udp(port) for port in range(5000, 5400)]
    rewrites = [rewrite for flow in flows for rewrite in flow.rewrites.values()]
    host.hand(*(each for each in rewrites if each.step is Step.U34))
    for start in range(0, 400, 100):
        host.hand(*(flow.rewrites[Step.U12] for flow in flows[start : start + 100]))
    assert len(list(host.maps.read(rewrites))) == len(rewrites) == 800
    assert len(host.withdraw(*rewrites)) == 800
    assert host.elements() == 0


def counted(rewrite: Rewrite, counts: dict[Rewrite, Count]) -> list[str]:
    """What nft is told to have an element count this much."""
    name = map_name(rewrite.flow.proto, rewrite.step)
    key = element(rewrite).strip("{ }")
    new = rewrite.new
    value = {
        Step.T1: int.from_bytes(new[10:]),
        Step.T2: int.from_bytes(new[8:10]),
        Step.T3: IPv4Address(new[:4]),
        Step.T4: IPv4Address(new[4:8]),
    }[rewrite.step]
    packets, size = counts[rewrite]
    counter = f"counter packets {packets} bytes {size}" if rewrite.step in SIDES else ""
    return [
        f"delete element ip {NAME} {name} {{ {key} }}",
        f"add element ip {NAME} {name} {{ {key} {counter} : {value} }}",
    ]


@pytest.mark.parametrize("what", ["gone", "another"])
def test_a_transaction_that_fails_changes_nothing(host: Host, what: str) -> None:
    rewrites = [host.udp(port).rewrites[Step.U12] for port in range(4000, 4010)]
    host.hand(*rewrites[:5])
    if what == "gone":
        with pytest.raises(OffloadLost, match="No such file"):
            host.withdraw(*rewrites[:3], rewrites[7], *rewrites[3:5])
    else:
        name = map_name(Proto.UDP, Step.U12)
        key = element(rewrites[8]).strip("{ }")
        nft("add", "element", "ip", NAME, name, f"{{ {key} : 203.0.113.7 }}")
        with pytest.raises(OffloadLost, match="exists"):
            host.hand(*rewrites[5:])
        delete(rewrites[8])

    host.maps.renew()
    assert host.elements() == 5
    assert [rewrite for rewrite, _ in host.maps.read(rewrites[:5])] == rewrites[:5]
    for rewrite in rewrites[5:]:
        with pytest.raises(OffloadLost):
            list(host.maps.read([rewrite]))


def test_what_somebody_has_deleted_is_noticed_when_it_is_read(host: Host) -> None:
    rewrites = [host.udp(port).rewrites[Step.U12] for port in range(4000, 4004)]
    host.hand(*rewrites)
    delete(rewrites[2])
    read = []
    with pytest.raises(OffloadLost, match="No such file"):
        read += [rewrite for rewrite, _ in host.maps.read(rewrites)]
    nft("flush", "ruleset")
    for call in (
        lambda: host.hand(rewrites[0]), lambda: host.withdraw(rewrites[0]),
        lambda: list(host.maps.read(rewrites[:1])),
    ):  # fmt: skip
        host.maps.renew()
        with pytest.raises(OffloadLost):
            call()


def test_answers_that_nobody_waited_for_are_not_taken_for_later_ones(host: Host) -> None:
    rewrites = [host.udp(port).rewrites[Step.U12] for port in range(4000, 4010)]
    missing = host.udp(5000).rewrites.values()
    host.hand(*rewrites)
    with pytest.raises(OffloadLost):
        host.withdraw(*missing)  # an error for each map, and one was read
    with pytest.raises(OffloadLost):  # by the other
        next(host.maps.read(rewrites))
    host.maps.renew()

    assert [rewrite for rewrite, _ in host.withdraw(*rewrites)] == rewrites
    assert list(host.maps.totals()) != []


class FailingOnce:
    """A socket of which one method fails, the first time, without having done anything."""

    def __init__(self, maps: NftBackend, method: str, number: int) -> None:
        self._socket, self._method, self._number = maps._socket, method, number

    def __getattr__(self, name: str) -> Any:
        if name != self._method:
            return getattr(self._socket, name)
        self._method = ""
        return self._fails

    def _fails(self, *_: object) -> None:
        raise OSError(self._number, os.strerror(self._number))


@pytest.mark.parametrize("method", ["send", "recv"])
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EIO, errno.EPERM, errno.EMFILE])
def test_a_call_that_fails_once_loses_no_map(host: Host, method: str, number: int) -> None:
    rewrite = host.udp(4000).rewrites[Step.U12]
    kernel = host.maps._socket
    host.maps._socket = FailingOnce(host.maps, method, number)  # type: ignore[assignment]
    host.hand(rewrite)
    host.maps._socket = FailingOnce(host.maps, method, number)  # type: ignore[assignment]
    assert [each for each, _ in host.maps.read([rewrite])] == [rewrite]
    host.maps._socket = kernel
    assert [each for each, _ in host.withdraw(rewrite)] == [rewrite]


def test_answers_that_the_kernel_had_no_room_for_are_lost(host: Host) -> None:
    rewrite = host.udp(4000).rewrites[Step.U12]
    kernel = host.maps._socket
    host.maps._socket = FailingOnce(host.maps, "recv", errno.ENOBUFS)  # type: ignore[assignment]
    with pytest.raises(OffloadLost):
        host.hand(rewrite)
    host.maps._socket = kernel


def test_before_the_maps_go_all_that_is_still_there_is_told_of(host: Host) -> None:
    flows = [host.tcp(port) for port in range(20000, 20400, 2)]
    rewrites = [rewrite for flow in flows for rewrite in flow.rewrites.values()]
    told = [rewrite for rewrite in rewrites if rewrite.step in SIDES]
    host.hand(*rewrites)
    assert Counter(rewrite for rewrite, _ in host.maps.leave(rewrites)) == Counter(told)
    assert host.elements() == 0

    host.hand(*rewrites)
    delete(rewrites[1])
    delete(told[5])
    rest = [rewrite for rewrite in told if rewrite is not told[5]]
    assert Counter(rewrite for rewrite, _ in host.maps.leave(rewrites)) == Counter(rest)
    nft("flush", "ruleset")
    assert list(host.maps.leave(rewrites)) == []


def test_thousands_go_in_and_out(host: Host) -> None:
    rewrites = [
        rewrite for port in range(10_000, 15_000) for rewrite in host.udp(port).rewrites.values()
    ]
    assert len(rewrites) == ROOM
    host.hand(*rewrites)
    assert host.elements() == ROOM
    assert [count for _, count in host.maps.read(rewrites)] == [Count(0, 0)] * ROOM
    assert Counter(rewrite for rewrite, _ in host.withdraw(*rewrites)) == Counter(rewrites)

    assert host.elements() == 0


def announced(watcher: RuleWatcher, act: Callable[[], object]) -> bool:
    """Whether the kernel announces what this does."""
    watcher.drain()
    act()
    return bool(select.select([watcher], [], [], 0.2)[0])


def test_own_changes_are_not_announced_and_those_of_others_are(host: Host) -> None:
    one, two = host.udp(4000).rewrites.values()
    with closing(RuleWatcher()) as watcher:
        assert announced(watcher, lambda: host.hand(one))
        watcher.ignore(host.maps.port)
        assert not announced(watcher, lambda: host.hand(two))
        assert not announced(watcher, lambda: host.withdraw(one))
        assert announced(watcher, lambda: delete(two))
        assert announced(watcher, lambda: nft("flush", "chain", "ip", NAME, "pre-udp"))
        nft("flush", "chain", "ip", NAME, "pre")
        assert watcher.drain() == frozenset({NAME})
        host.maps.renew()
        watcher.ignore(host.maps.port)
        assert not announced(watcher, lambda: host.hand(one))
