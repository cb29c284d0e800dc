"""Hosts as network namespaces of one kernel: named ones, so that `ip netns` shows them.

A namespace belongs to a *thread*.  So the network is built by one short-lived thread that unshares
a namespace after the other, pins each to a name, and opens a netlink socket in each: no helper
processes, and the callers' own thread never moves.  Veth pairs are made inside one end's namespace
with the other end born in its own (IFLA_NET_NS_FD of the peer), bridges in a namespace of their
own.

The namespace of a virtual machine is its cabling.  The wire ends there as it does in any host; a
bridge joins that end to a tap device, which is the machine's.  The machine has the addresses, so
these devices have none, and what crosses the bridge meets no rules.

Nothing ever shows up in the root namespace, not even for a moment: a network manager there
would seize it, and two labs would have to agree on names.

pyroute2's NetNS and pushns are not used: the first starts a process for each namespace, the second
asks /proc/self, which is the main thread's namespace whoever calls.
"""

import ctypes
import errno
import fcntl
import os
import signal
import socket
import struct
import threading
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute, NetlinkError
from pyroute2 import netns as pyroute2_netns

from krelay_vm import guest
from krelay_vm.topology import SWITCH, Interface, Topology

RUN = Path("/run/netns")
"""Where names of namespaces live (ip-netns(8))."""

BRIDGE_NETFILTER = Path("/proc/sys/net/bridge")
"""The reader's own; there if the kernel can show bridged packets to iptables, and then it does."""

CLONE_NEWNET = 0x40000000  # linux/sched.h
TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB  # linux/if_tun.h
IFF_TAP, IFF_NO_PI = 0x0002, 0x1000
IFA_F_NODAD = 0x02  # linux/if_addr.h: an IPv6 address is usable at once

_libc = ctypes.CDLL(None, use_errno=True)


def namespaces(topology: Topology) -> list[str]:
    """What has a namespace: the hosts, and the switch if there is a segment."""
    switched = any(wire.switched for wire in topology.wires)
    return [*topology.names, *([SWITCH] if switched else [])]


def build(topology: Topology, prefix: str, machines: Collection[str] = ()) -> None:
    """Makes the network, its namespaces called `PREFIX-HOST`; those of `machines` are cabling.

    Raises OSError, and then leaves behind what it has made.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            thread.submit(_build, topology, prefix, machines).result()
        except NetlinkError as error:
            raise OSError(error.code, f"netlink: {os.strerror(error.code)}") from error


def remove(names: Iterable[str]) -> None:
    """Removes namespaces, as far as they exist, and with them their devices."""
    for name in names:
        with suppress(FileNotFoundError):
            pyroute2_netns.remove(name)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """The calling thread, and only it, is in that namespace; sockets opened here stay there."""
    with ExitStack() as stack:
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        stack.callback(os.close, home)
        target = os.open(RUN / name, os.O_RDONLY)
        stack.callback(os.close, target)
        pyroute2_netns.setns(target)
        stack.callback(pyroute2_netns.setns, home)
        yield


def command(name: str, *argv: str) -> tuple[str, ...]:
    """The command line that runs `argv` in the namespace, as the very process that is started."""
    return ("nsenter", f"--net={RUN / name}", "--", *argv)


def processes(names: Collection[str]) -> list[int]:
    """The pids of the processes in those namespaces, but for our own."""
    wanted = _identities(names)
    pids = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    return [pid for pid in pids if pid != os.getpid() and _is_in(pid, wanted)]


def kill(names: Collection[str]) -> None:
    """Sends SIGKILL to every process in those namespaces, but for our own."""
    wanted = _identities(names)
    for pid in processes(names):
        with suppress(ProcessLookupError):
            handle = os.pidfd_open(pid)
            try:
                # The pid may have passed to another process since: the handle can't, so look again.
                if _is_in(pid, wanted):
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
            finally:
                os.close(handle)


def _identities(names: Iterable[str]) -> set[tuple[int, int]]:
    """What tells the namespaces apart, for those that exist."""
    found = set()
    for name in names:
        with suppress(FileNotFoundError):
            found.add(_identity(RUN / name))
    return found


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _is_in(pid: int, wanted: set[tuple[int, int]]) -> bool:
    try:
        return _identity(Path(f"/proc/{pid}/ns/net")) in wanted
    except OSError:
        return False


def _build(topology: Topology, prefix: str, machines: Collection[str]) -> None:
    """Runs in a thread of its own, which ends in the last namespace it has made."""
    with ExitStack() as stack:
        netlink: dict[str, Any] = {}
        handles: dict[str, int] = {}
        for host in namespaces(topology):
            handles[host] = _create(f"{prefix}-{host}")
            stack.callback(os.close, handles[host])
            netlink[host] = stack.enter_context(IPRoute())
        enter = pyroute2_netns.setns
        for host in topology.names:
            enter(handles[host])
            if host in machines:
                _write_sysctls({"net.ipv6.conf.default.disable_ipv6": "1"})
                continue
            names = [end.name for end in topology.interfaces(host)]
            settings = topology.sysctls(host).items()
            _write_sysctls({key: value for key, value in settings if not _about(key, names)})
        if SWITCH in handles:
            enter(handles[SWITCH])
            _write_sysctls({"net.ipv6.conf.default.disable_ipv6": "1"})
        _make_wires(topology, netlink, handles)
        for host in topology.names:
            enter(handles[host])
            if host in machines:
                _cable(topology, host, netlink[host])
            else:
                _configure(topology, host, netlink[host])


def set_link(topology: Topology, prefix: str, host: str, interface: str, *, up: bool) -> None:
    """Cuts the wire at that end of it, or joins it again.  Raises OSError.

    The routes that the kernel forgets with an interface that goes down come back with it.
    """
    with inside(f"{prefix}-{host}"), IPRoute() as netlink:
        index = _index(interface)
        try:
            netlink.link("set", index=index, state="up" if up else "down")
            if up and netlink.get_addr(index=index, family=socket.AF_INET):
                for route in topology.routes(host):
                    netlink.route("replace", dst=route.destination, gateway=route.via)
        except NetlinkError as error:
            raise OSError(error.code, f"netlink: {os.strerror(error.code)}") from error


def _create(name: str) -> int:
    """Moves this thread to a new namespace of that name; returns a descriptor of it."""
    if _libc.unshare(CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"can't make a network namespace: {os.strerror(code)}")
    # attach() wants a pid for /proc/PID/ns/net; it must be this thread's, not the process's.
    pyroute2_netns.attach(name, f"self/task/{threading.get_native_id()}")
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY)


def _make_wires(topology: Topology, netlink: dict[str, Any], handles: dict[str, int]) -> None:
    """Called, and left, inside the switch if there is one."""
    for number, wire in enumerate(topology.wires):
        if not wire.switched:
            near, far = wire.ends
            _make_pair(netlink[near.host], near.name, near.mtu, handles[far.host], far.name)
            continue
        switch = netlink[SWITCH]
        bridge = f"br{number}"
        # Without snooping the bridge is a plain switch: it says nothing and holds nothing back.
        switch.link("add", ifname=bridge, kind="bridge", br_mcast_snooping=0)
        master = _index(bridge)
        switch.link("set", index=master, state="up")
        for end in wire.ends:
            port = f"{number}-{end.host}"
            _make_pair(switch, port, end.mtu, handles[end.host], end.name)
            switch.link("set", index=_index(port), master=master, state="up")


def _make_pair(netlink: Any, name: str, mtu: int | None, far: int, far_name: str) -> None:
    size = {} if mtu is None else {"mtu": mtu}
    peer = {"ifname": far_name, "net_ns_fd": far, **size}
    netlink.link("add", ifname=name, kind="veth", peer=peer, **size)


def _cable(topology: Topology, host: str, netlink: Any) -> None:
    """Joins each end of a wire to a tap device."""
    netlink.link("set", index=_index("lo"), state="up")
    if (BRIDGE_NETFILTER / "bridge-nf-call-iptables").exists():
        for family in ("iptables", "ip6tables", "arptables"):
            (BRIDGE_NETFILTER / f"bridge-nf-call-{family}").write_text("0")
    for end in topology.interfaces(host):
        size = {} if end.mtu is None else {"mtu": end.mtu}
        bridge = end.name.replace("eth", "br")
        netlink.link("add", ifname=bridge, kind="bridge", br_mcast_snooping=0)
        master = _index(bridge)
        _make_tap(guest.tap(end))
        for name in (guest.tap(end), end.name):
            netlink.link("set", index=_index(name), master=master, state="up", **size)
        netlink.link("set", index=master, state="up")


def _make_tap(name: str) -> None:
    """A tap device that stays, in this thread's namespace."""
    tun = os.open("/dev/net/tun", os.O_RDWR)
    try:
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
        fcntl.ioctl(tun, TUNSETPERSIST, 1)
    finally:
        os.close(tun)


def _configure(topology: Topology, host: str, netlink: Any) -> None:
    netlink.link("set", index=_index("lo"), state="up")
    interfaces = topology.interfaces(host)
    for interface in interfaces:
        _address(netlink, interface)
    for route in topology.routes(host):
        netlink.route("add", dst=route.destination, gateway=route.via)
    names = [interface.name for interface in interfaces]
    settings = topology.sysctls(host).items()
    _write_sysctls({key: value for key, value in settings if _about(key, names)})


def _address(netlink: Any, interface: Interface) -> None:
    index = _index(interface.name)
    for address in interface.addresses:
        fast = {"flags": IFA_F_NODAD} if address.version == 6 else {}
        length = address.network.prefixlen
        netlink.addr("add", index=index, address=str(address.ip), prefixlen=length, **fast)
    netlink.link("set", index=index, state="up")


def _index(name: str) -> int:
    """The number of an interface in this thread's namespace.  Raises OSError."""
    try:
        return socket.if_nametoindex(name)
    except OSError:
        raise OSError(errno.ENODEV, f"no interface {name}") from None


def _about(key: str, names: list[str]) -> bool:
    """Whether a setting belongs to one of these interfaces, and so must wait for it."""
    return any(part in names for part in key.split("."))


def _write_sysctls(settings: dict[str, str]) -> None:
    """Writes settings of this thread's namespace: /proc/sys/net shows the reader's own."""
    root = Path("/proc/sys")
    for key, value in settings.items():
        # A kernel without IPv6 has none to keep quiet; its addresses fail later, with a reason.
        if key.startswith("net.ipv6.") and not (root / "net/ipv6").exists():
            continue
        try:
            (root / key.replace(".", "/")).write_text(value)
        except OSError as error:
            raise OSError(error.errno, f"sysctl {key}={value}: {error.strerror}") from None
