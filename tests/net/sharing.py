"""A world that tests share, one after the other: what each left is put back, and looked for.

`Shared` notes how a world is once it relays.  `restore` ends what a test began, then compares: who
left something that can't be put back fails by it.

Put back: sockets of `World.open`, programs, settings, `start`, flows, sockets and connection
tracking of the hosts, tables of nft that weren't there.  Only looked for, so a test that changes
them puts them back by itself: other rules, links, addresses, routes, routing rules, neighbours set
by hand, sysctls, the processes of the world.  Neither: counters and the log, of which
`World.counted` and `World.logged` tell what is this test's, offloads of adapters (ethtool), and
warnings that krelay says once in ten seconds; a test of these takes the fixture `world`.
"""

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import unified_diff
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from knet import netlink
from knet.netlink import sockdiag
from knet.netlink.socket import SIZE, NetlinkSocket
from krelay_vm import LabTimeout
from tests.net.world import World, control_socket

RTNETLINK = 0
LINK, ADDRESS, ROUTE, NEIGHBOUR, RULE, CONFIG = 18, 22, 26, 30, 34, 82
"""RTM_GETLINK and so on (linux/rtnetlink.h)."""
HEADS = {LINK: 16, ADDRESS: 8, ROUTE: 12, NEIGHBOUR: 12, RULE: 12, CONFIG: 4}
"""Bytes before the attributes."""
OF_LINKS = {1, 3, 4, 5, 6, 10, 16}
"""IFLA_ADDRESS, _IFNAME, _MTU, _LINK, _QDISC, _MASTER, _OPERSTATE; others count, or are rare."""
RESTLESS = {ADDRESS: {6}, ROUTE: {12}, NEIGHBOUR: {3, 4}}
"""Lifetimes, cache statistics and probes."""
PERMANENT = 0x80
NFTABLES, GENERATION = 10, 16
CONNTRACK, FORGET = 1, 2
DESTROY = 21
"""SOCK_DESTROY (linux/sock_diag.h)."""
NO_LISTENERS = (1 << 12) - 1 & ~(1 << sockdiag.LISTEN | 1 << 7)
"""All states but LISTEN and CLOSE."""
SYSCTLS = Path("/proc/sys/net")
MOVING = {"nf_conntrack_count", "tcp_fastopen_key", "fib_sync_mem"}
OF_STATUS = {"generation", "uptime", "conntrack"}
"""What `show status` may say otherwise than at first: krelay looks for connection tracking now and
then only."""
TOGETHER = 100
"""Commands to the control socket at once."""
State = dict[str, Any]
T = TypeVar("T")


class Shared:
    """A world that relays, and how it was when it began to."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._programs = tuple(world.lab.programs)
        self._hosts = [host.name for host in world.lab.topology.hosts]
        self._generations = {host: self._inside(host, generation) for host in self._hosts}
        self._first = self._networks()
        self._status_at_first = self._status()
        self._rules = {host: world.rules(host) for host in self._hosts}
        self._settings = self._in_force()
        world.mark()

    def _inside(self, host: str, read: Callable[[], T]) -> T:
        with self.world.lab.enter(host):
            return read()

    def restore(self) -> None:
        """Puts the world back as it was, and asserts that it is.

        Raises AssertionError, also with LabTimeout for a cause, where it can't be had.
        """
        self._end()
        for host in self._hosts:
            self._remove_tables(host)
        self._write_back()
        self._end_flows()
        for host in self._hosts:
            self._forget(host)
        self._check()
        self.world.mark()

    def _end(self) -> None:
        """Sockets and programs of the test."""
        world = self.world
        world.close_sockets()
        for program in world.lab.programs[len(self._programs) :]:
            program.kill()
            program.wait()
            print(f"--- {program}\n{program.output[-4000:]}")
            program.log.unlink(missing_ok=True)
        del world.lab.programs[len(self._programs) :]
        assert tuple(world.lab.programs) == self._programs
        ended = [str(program) for program in self._programs if program.poll() is not None]
        assert not ended, f"ended: {ended}"
        daemons = {world.krelay_process, world.tcp_relay_process}
        assert daemons <= set(self._programs)

    def _in_force(self) -> dict[str, str]:
        lines = self.world.read("status/applied").splitlines()
        values = dict(line.split("=", 1) for line in lines)
        del values["generation"]
        return values

    def _write_back(self) -> None:
        """Relaying ends for a moment if there are connections, ended ones stay for a while, or
        flows of the host's own; or other settings, as rules that grew have another order.
        """
        world, now = self.world, self._in_force()
        wrong = {name: text for name, text in self._settings.items() if now[name] != text}
        for line in world.read("status/errors").splitlines():
            name = line.partition(":")[0]
            wrong[name] = self._settings[name]
        status = self._status()
        if status["flows_tcp"] or status["own_flows"] or wrong:
            wrong.pop("start", None)
            relay_anew(world, **wrong)
        world.until_state("running")
        assert self._in_force() == self._settings
        assert not world.read("status/errors")

    def _end_flows(self) -> None:
        """A packet that is under way may begin one more."""
        try:
            self.world.until(self._are_ended, "no flow")
        except LabTimeout:
            raise AssertionError(changes(self._status_at_first, self._status())) from None

    def _are_ended(self) -> bool:
        world = self.world
        flows = [line.split(maxsplit=1)[0].removeprefix("id=") for line in world.ask("show nat")]
        for at in range(0, len(flows), TOGETHER):
            with control_socket(world.root) as connection:
                commands = "".join(f"kill {flow}\n" for flow in flows[at : at + TOGETHER])
                connection.sendall(commands.encode())
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(SIZE):
                    pass
        return self._status() == self._status_at_first

    def _status(self) -> State:
        found = self.world.values("status")
        return {name: value for name, value in found.items() if name not in OF_STATUS}

    def _forget(self, host: str) -> None:
        """Sockets that have no owner, what connection tracking and the cache of routes know."""
        with self.world.lab.enter(host):
            destroy_sockets()
            with NetlinkSocket(netlink.FAMILY, timeout=2) as kernel, suppress(OSError):
                message = netlink.message(CONNTRACK, FORGET, netlink.ACK, family=0)
                kernel.carry_out(message, 1)
            (SYSCTLS / "ipv4/route/flush").write_text("1")

    def _networks(self) -> dict[str, State]:
        return {host: self._inside(host, network) for host in self._hosts}

    def _check(self) -> None:
        for host in self._hosts:
            self._check_rules(host)
        now = self._networks()
        for name, first in self._first.items():
            assert now[name] == first, f"{name}: {changes(first, now[name])}"

    def _remove_tables(self, host: str) -> None:
        """Those that weren't there at first."""
        if self._inside(host, generation) == self._generations[host]:
            return
        shown = self.world.run(host, "nft", "list", "tables")
        for line in set(tables(shown)) - set(tables(self._rules[host])):
            self.world.nft(host, f"delete {line}")

    def _check_rules(self, host: str) -> None:
        """The text is compared only if something has changed: a flow of the kernel's is enough."""
        now = self._inside(host, generation)
        if now == self._generations[host]:
            return
        world, first = self.world, self._rules[host]
        rules = world.rules(host)
        try:  # krelay follows what changes in its host
            world.until(lambda: rules == first or world.rules(host) == first, "the first rules")
        except LabTimeout:
            rules = world.rules(host)
            left = "\n".join(unified_diff(first.splitlines(), rules.splitlines(), lineterm=""))
            raise AssertionError(f"rules of {host}\n{left}") from None
        if host == "relay" and world.in_kernel:
            assert world.handed() == 0
        self._generations[host] = self._inside(host, generation)


def relay_anew(world: World, **settings: str) -> None:
    """Ends relaying, and begins it with these settings."""
    world.put(start=0)
    world.until_state("stopped")
    world.put(None, **settings, start=1)
    world.until_state("running")


def changes(first: State, now: State) -> str:
    """What is otherwise than at first."""
    return ", ".join(
        f"{name}: {now.get(name)}, at first {first.get(name)}"
        for name in sorted(first | now)
        if first.get(name) != now.get(name)
    )


def tables(rules: str) -> list[str]:
    """`table ip NAME`, of all tables that nft shows or lists."""
    return [line.split(" {")[0] for line in rules.splitlines() if line.startswith("table ")]


def generation() -> bytes:
    """Changes with each change of nft's rules in this network."""
    with NetlinkSocket(netlink.FAMILY, timeout=2) as kernel:
        kernel.send(netlink.message(NFTABLES, GENERATION, 0, family=0))
        return dict(netlink.attributes(kernel.recv(SIZE)[netlink.HEAD + netlink.GENERIC :]))[1]


def dump(kernel: NetlinkSocket, request: bytes) -> Iterator[netlink.Message]:
    """All that the kernel answers to a request for a list."""
    kernel.send(request)
    while True:
        for message in netlink.messages(kernel.recv(1 << 18)):
            if (message.subsystem, message.kind) == (0, netlink.DONE):
                return
            assert message.error is None, os.strerror(message.error or 0)
            yield message


def network() -> State:
    """Links, addresses, routes, neighbours set by hand and sysctls of the network we are in."""
    found: State = {}
    with NetlinkSocket(RTNETLINK, timeout=2) as kernel:
        for kind, head in HEADS.items():
            request = netlink.request(kind, netlink.DUMP, bytes([socket.AF_INET]) + bytes(head - 1))
            if kind == LINK:
                request = netlink.request(kind, netlink.DUMP, bytes(head))
            found[f"rtnetlink {kind}"] = sorted(
                told(kind, message.body)
                for message in dump(kernel, request)
                if kind != NEIGHBOUR or struct.unpack_from("=H", message.body, 8)[0] & PERMANENT
            )
    return found | sysctls()


def told(kind: int, body: bytes) -> tuple[object, ...]:
    """What a message tells, without what moves."""
    head = HEADS[kind]
    attributes = (
        (name, value)
        for name, value in netlink.attributes(body[head + -head % 4 :])
        if (name in OF_LINKS if kind == LINK else name not in RESTLESS.get(kind, ()))
    )
    return (body[:head], *sorted(attributes))


@cache
def sysctl_files() -> tuple[str, ...]:
    """Those of a network, but for IPv6's; of single links, what CONFIG tells."""
    folders = (SYSCTLS / name for name in ("ipv4", "netfilter", "ipv4/conf/all"))
    files = (file for folder in folders if folder.is_dir() for file in folder.iterdir())
    return tuple(str(file) for file in files if file.name not in MOVING and file.is_file())


def sysctls() -> State:
    """Of the network we are in."""
    found: State = {}
    for path in sysctl_files():
        with suppress(OSError):
            file = os.open(path, os.O_RDONLY)
            try:
                found[path] = os.read(file, 4096)
            finally:
                os.close(file)
    return found


def destroy_sockets() -> None:
    """Ends the TCP sockets of the network we are in, also those that wait; not the listeners."""
    with NetlinkSocket(sockdiag.FAMILY, timeout=2) as kernel:
        question = bytes([sockdiag.IPV4, socket.IPPROTO_TCP, 0, 0])
        states = NO_LISTENERS.to_bytes(4, "little")
        asked = question + states + bytes(48)
        request = netlink.request(sockdiag.BY_FAMILY, netlink.DUMP, asked)
        for message in list(dump(kernel, request)):
            body = question + states + message.body[4:52]
            with suppress(FileNotFoundError):
                kernel.carry_out(netlink.request(DESTROY, netlink.ACK, body), 1)
