"""What /proc shows: settings, counters, sockets, who serves the queue."""

import os
import socket
import sys
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path as FilePath

from knet import listeners, localports
from knet.sockbuf import Direction
from krelay.control import client as control
from krelay.doctor.facts import ListenerFacts
from krelay.doctor.seen import NET, SYS, Survey, number
from krelay.host import processes, tracking

_QUEUES = NET / "netfilter/nfnetlink_queue"


def queue(seen: Survey) -> None:
    """The netfilter queue, and who serves it."""
    if not _QUEUES.exists():  # a module is loaded when the queue is first asked for
        seen.add(has_queue=_is_module("nfnetlink_queue"))
        return
    from krelay.datapath.nfqueue import figures, figures_shown

    if not figures_shown():
        seen.unseen("queue", "who serves which queue is shown to root and its group alone")
        return
    found = figures(seen.facts.queue_num)
    if found is None:
        return
    if _relays(seen):
        seen.add(queue_lost=(found.queue_dropped, found.socket_dropped))
    else:
        seen.add(queue_taken=True)


def _relays(seen: Survey) -> bool:
    """Whether the queue is this krelay's: it may have begun to relay since it was asked."""
    if seen.facts.served and seen.facts.state == "running":
        return True
    try:
        return bool(control.ask_json(seen.root, "show status json")[0]["state"] == "running")
    except (control.NoDaemon, control.Rejected):
        return False


def settings(seen: Survey) -> None:
    """Kernel settings and counters in /proc."""
    ipv4 = SYS / "ipv4"
    low, high = map(int, (ipv4 / "ip_local_port_range").read_text().split())
    rmem = SYS / "core/rmem_max"  # not there in a network namespace of older kernels
    seen.add(
        forwards=bool(number(ipv4 / "ip_forward")),
        rp_filter_all=number(ipv4 / "conf/all/rp_filter"),
        rp_filtered=_netstat("IPReversePathFilter"),
        rmem_max=number(rmem) if rmem.exists() else None,
        buffer_is_granted=_may_enlarge(),
        tracked=_tracked(),
        timers=tracking.timers(),
        port_range=(low, high),
        reserved_ports=localports.reserved(FilePath(localports.RESERVED).read_text()),
    )


def listening(seen: Survey) -> None:
    """Who else listens at what is relayed."""
    config = seen.facts.config
    found = []
    for proto, address, port, inode in _sockets():
        is_gateway = proto == "tcp" and port == config.gport
        if not (config.serves(proto, port) or is_gateway):
            continue
        if is_gateway and seen.facts.gateway == "served":
            continue  # tcp-relay's, and krelay's, which holds it
        who = listeners.holder([inode])
        process = processes.look(who.pid) if who else None
        if process is not None and _is_ours(seen, process):
            continue
        if who is None and is_gateway and seen.facts.uid != 0:
            what = f"who listens on port {port} is shown to root alone"
            seen.unseen("gateway port", what)
            continue
        name, pid = (who.name, who.pid) if who else ("another program", None)
        found.append(ListenerFacts(proto, address, port, name, pid, _unit(pid) if pid else ""))
    seen.add(listeners=tuple(sorted(found, key=lambda one: (one.proto, one.port))))


def _is_ours(seen: Survey, process: processes.RunningProgram) -> bool:
    """tcp-relay, which may have begun to listen since krelay was asked; or krelay, which holds the
    sockets that tcp-relay has handed it, and no other listener."""
    return processes.program(process.arguments) is not None and process.serves(seen.root)


def _sockets() -> Iterator[tuple[str, IPv4Address | None, int, int]]:
    """Protocol, address, port and inode of each socket that takes what comes to its port."""
    for proto, states in (("tcp", ("0A",)), ("udp", ("07",))):  # include/net/tcp_states.h
        for table in (proto, f"{proto}6"):
            try:
                lines = (NET / table).read_text().splitlines()[1:]
            except OSError:
                continue
            for line in lines:
                fields = line.split()
                address, _, port = fields[1].rpartition(":")
                if fields[3] in states:
                    yield proto, _address(address), int(port, 16), int(fields[9])


def _address(text: str) -> IPv4Address | None:
    """As /proc/net/tcp shows it, in the host's order; None for all addresses and for IPv6's."""
    if len(text) != 8:
        return None if not int(text, 16) else IPv4Address("127.0.0.1")
    raw = int(text, 16).to_bytes(4, sys.byteorder)
    return IPv4Address(raw) if any(raw) else None


def _unit(pid: int) -> str:
    """The service that systemd counts the process to."""
    try:
        text = FilePath(f"/proc/{pid}/cgroup").read_text().strip()
    except OSError:
        return ""
    last = text.rpartition("/")[2]
    return last if last.endswith(".service") else ""


def _tracked() -> tuple[int, int] | None:
    base = SYS / "netfilter"
    try:
        return number(base / "nf_conntrack_count"), number(base / "nf_conntrack_max")
    except OSError:
        return None


def _may_enlarge() -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, Direction.RECEIVING, 1)
        except PermissionError:
            return False
    return True


def _netstat(name: str) -> int:
    """A counter of the extended statistics of TCP, which hold those of IP as well."""
    lines = (NET / "netstat").read_text().splitlines()
    for heads, values in zip(lines[::2], lines[1::2], strict=False):
        counters = dict(zip(heads.split(), values.split(), strict=False))
        if name in counters:
            return int(counters[name])
    return 0


def _is_module(name: str) -> bool:
    """Whether the kernel that runs has this as a module (depmod(8))."""
    try:
        text = FilePath(f"/lib/modules/{os.uname().release}/modules.dep").read_text()
    except OSError:
        return False
    return f"/{name}.ko" in text
