"""What every measurement stands on: a lab with a relay in it, a sender, counters, and progress.

Packets are counted where they arrive, by the server's interface, and the server's kernel throws
them away there (raw table): no sink process takes part.  The sender stays on one core and a relay's
worker on another.  What the kernel does before the queue, or by itself, it does on the sender's
core: there the veth driver hands packets on.

No path is measured before a datagram has come through it, with the client's address.
"""

import os
import platform
import resource
import select
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from shutil import which
from typing import NamedTuple

from benchmarks import processes, sender
from knet.children import compiled_as_here
from krelay.control import client
from krelay.datapath import nfqueue
from krelay.rules import DEFAULT_QUEUE
from krelay_vm import Lab, LabError

PYTHON = (sys.executable, *compiled_as_here(), "-P")
"""-P: only what is installed is imported, nothing that lies beside a program."""
WITH_BENCHMARKS = {"PYTHONPATH": str(Path(__file__).parents[1])}
"""The environment of a program that imports from this package, which isn't installed."""
SOURCE_PORT = 40000
SERVICE_PORT = 5000
WARM_UP = 0.5
TRAIN = 32
"""Datagrams per call of the sender that nothing keeps up with."""
QUEUE, AUTO = "krelay, queue path", "krelay"
DATAPATHS = {QUEUE: {"datapath": "queue"}, AUTO: {"datapath": "auto"}}
"""The ways that packets take through krelay, by name: the settings for each."""
NO_LIMITS = {"limits/flows": "1000000", "limits/flows_per_client": "1000000"}
"""One client opens more flows here in a minute than others in a week."""
_DNAT = """\
table ip benchmark {{
    chain prerouting {{
        type nat hook prerouting priority dstnat
        ip daddr {relay} {proto} dport {{ {ports} }} dnat to {server}
    }}
}}
"""


class CannotMeasure(Exception):
    """A path doesn't work, or this machine lacks something.  The text says what."""


@dataclass(frozen=True, slots=True)
class Wish:
    """How much is to be measured."""

    rounds: int
    seconds: float


def cores() -> tuple[int, int]:
    """The core for senders and the one for relays' workers: -1 each if there is just one."""
    usable = sorted(os.sched_getaffinity(0))
    return (usable[0], usable[1]) if len(usable) > 1 else (-1, -1)


def machine() -> dict[str, str]:
    """What is on the machine; how busy others keep it takes half a second to see."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    return {
        "cores": str(len(os.sched_getaffinity(0))),
        "processor": model,
        "load before": load,
        "busy before": f"{_busy(0.5):.0%}",
        "kernel": platform.release().partition("-")[0],
        "Python": platform.python_version(),
        "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }


def _busy(seconds: float) -> float:
    """The share of all cores' time that isn't idle."""
    before = processes.cores()["cpu"]
    time.sleep(seconds)
    after = processes.cores()["cpu"]
    busy, idle = after.busy - before.busy, after.idle - before.idle
    return busy / max(busy + idle, 0.01)


@dataclass(slots=True)
class Progress:
    """Tells what is measured while it is, and collects the readings."""

    group: str
    readings: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        """A line to standard error."""
        print(f"{self.group}: {text}", file=sys.stderr, flush=True)

    def take(self, turn: int, rounds: int, name: str, unit: str, value: float) -> None:
        """A reading."""
        self.readings.setdefault((name, unit), []).append(value)
        self.say(f"round {turn + 1}/{rounds}  {name}  {value:,.1f} {unit}")

    def leave_out(self, reason: str) -> None:
        """Something can't be measured here."""
        self.left_out.append(reason)
        self.say(f"left out: {reason}")


def missing(needs: Iterable[str]) -> str:
    """The first of these programs, or files by their path, that isn't there; empty if all are."""

    def is_there(need: str) -> bool:
        return Path(need).exists() if need.startswith("/") else which(need) is not None

    return next((need for need in needs if not is_there(need)), "")


def open_files(wanted: int) -> int:
    """Lets this process, and what it starts, have so many files open; or how many there may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, max(hard, wanted)))
        except ValueError:  # more than the hard limit needs CAP_SYS_RESOURCE
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return min(wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


def pinned(core: int) -> tuple[str, ...]:
    """The beginning of a command line that keeps the rest on a core."""
    return () if core < 0 else ("taskset", "--cpu-list", str(core))


def root_of(lab: Lab) -> Path:
    """The file tree of the krelay in the lab's relay host."""
    return lab.directory / "krelay"


def start_krelay(lab: Lab, settings: Mapping[str, str], core: int = -1) -> Path:
    """A krelay daemon that relays in the lab's relay host; its file tree."""
    root = root_of(lab)
    wanted = {"real_ip": lab.address("server"), **settings, "start": "1"}
    for name, value in wanted.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(value + "\n")
    command = (*PYTHON, "-m", "krelay", "daemon", "--root", str(root), "--log-level", "warning")
    daemon = lab.start("relay", *pinned(core), *command)
    state = root / "status/state"

    def runs() -> bool:
        text = state.read_text().strip() if state.exists() else ""
        if text.startswith("failed") or daemon.poll() is not None:
            raise CannotMeasure(f"krelay doesn't relay: {text or daemon.output.strip()[-300:]}")
        return text == "running"

    lab.wait(runs, "krelay relaying")
    return root


def live_flows(root: Path) -> int:
    """How many flows that krelay has."""
    return int(client.ask_json(root, "show status json")[0]["flows"])


def dnat(lab: Lab, proto: str, ports: Iterable[int]) -> None:
    """What the kernel has for the purpose: destination NAT by nft, with connection tracking."""
    rules = _DNAT.format(
        relay=lab.address("relay", "client"),
        proto=proto,
        ports=", ".join(map(str, ports)),
        server=lab.address("server"),
    )
    lab.run("relay", "nft", "-f", "-", input=rules)


class Passed(NamedTuple):
    """What has come to the server in some time."""

    packets: int
    seconds: float
    spent: float
    """What a meter has shown meanwhile."""

    @property
    def rate(self) -> float:
        """Packets per second."""
        return self.packets / self.seconds


def rate_of(
    lab: Lab,
    to: str,
    seconds: float,
    *,
    per_call: int = 1,
    size: int = sender.SMALL,
    endpoints: int | None = None,
) -> float:
    """UDP packets per second that reach the server from the client, sent to the address `to`.

    One flow of packets of `size` bytes, or with `endpoints` small ones of that many by turns.
    Waits before for the warm-up, and after until no queue holds any.
    """
    if endpoints is None:
        return send_one(lab, to, seconds, per_call=per_call, size=size).rate
    what = ("many", to, SERVICE_PORT, lab.address("client"))
    return _pass(lab, seconds, time.monotonic, *what, _for(seconds), cores()[0], endpoints).rate


def send_one(
    lab: Lab,
    to: str,
    seconds: float,
    meter: Callable[[], float] = time.monotonic,
    *,
    per_call: int = 1,
    size: int = sender.SMALL,
    pace: int = 0,
) -> Passed:
    """The same for one flow, with what the meter has shown: at most `pace` a second, if not 0."""
    what = ("one", to, SERVICE_PORT, SOURCE_PORT, _for(seconds), cores()[0], per_call, size, pace)
    return _pass(lab, seconds, meter, *what)


def _for(seconds: float) -> float:
    """How long a sender must send for a reading of so many seconds."""
    return seconds + 2 * WARM_UP


def _pass(lab: Lab, seconds: float, meter: Callable[[], float], *what: object) -> Passed:
    before = received(lab)
    source = lab.start("client", *PYTHON, sender.__file__, *map(str, what))
    lab.wait(lambda: received(lab) > before + 10 or source.poll() is not None, "first packets")
    time.sleep(WARM_UP)
    first, began, unspent = received(lab), time.monotonic(), meter()
    time.sleep(seconds)
    last, ended, spent = received(lab), time.monotonic(), meter()
    if source.wait(seconds + 10) != 0:
        raise CannotMeasure(f"the sender failed: {source.output.strip()[-300:]}")
    lab.programs.remove(source)
    settle(lab)
    return Passed(last - first, ended - began, spent - unspent)


def received(lab: Lab) -> int:
    """Packets that the server's interface has received (proc_net_dev: the second column)."""
    with lab.enter("server"):
        text = Path("/proc/thread-self/net/dev").read_text()
    for line in text.splitlines():
        name, _, counters = line.partition(":")
        if name.strip() == "eth0":
            return int(counters.split()[1])
    raise CannotMeasure("the server has no eth0")


def settle(lab: Lab, queues: tuple[int, ...] = (DEFAULT_QUEUE, 0)) -> None:
    """Waits until the queues of the relay hold nothing, so that the next measurement is alone."""

    def empty() -> bool:
        with lab.enter("relay"):
            served = [nfqueue.figures(number) for number in queues]
        return not any(each.waiting for each in served if each)

    lab.wait(empty, "the queue drained", 30)


def queue_visits(lab: Lab) -> int:
    """Packets that the kernel has handed to the relay's queues since these were bound."""
    with lab.enter("relay"):
        return parse_visits(Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text())


def parse_visits(text: str) -> int:
    """Reads the kernel's figures of queues: each numbers its packets, in the last column but one.

    One count for all queues together (net/netfilter/nfnetlink_queue.c, seq_show).
    """
    return sum(int(line.split()[-2]) for line in text.splitlines())


def check_udp(lab: Lab, to: str, port: int = SERVICE_PORT) -> None:
    """Sees a datagram through the path, whole and with the client's address, or CannotMeasure."""
    with lab.enter("server"):
        sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with lab.enter("client"):
        source = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with sink, source:
        sink.bind(("", port))
        source.bind(("", SOURCE_PORT))
        source.sendto(b"through", (to, port))
        if not select.select([sink], [], [], 5.0)[0]:
            raise CannotMeasure(f"no datagram to {to} reaches the server")
        data, sender_address = sink.recvfrom(100)
    expected = (b"through", (lab.address("client"), SOURCE_PORT))
    if (data, sender_address) != expected:
        raise CannotMeasure(f"the server got {data!r} from {sender_address}, not {expected}")


def discard_at_server(lab: Lab) -> None:
    """From now on the server's kernel throws UDP away where it comes in."""
    lab.run("server", "iptables", "-t", "raw", "-A", "PREROUTING", "-p", "udp", "-j", "DROP")


def offer_trains(lab: Lab) -> bool:
    """Lets the client's interface cut trains into datagrams; whether that can be had here."""
    return not lab.run(
        "client", "ip", "link", "set", "eth0", "gso_max_segs", "1", check=False
    ).status


def flows_ended(lab: Lab) -> None:
    """Waits until krelay has no flow left, so that none ends while something else is measured."""
    lab.wait(lambda: not live_flows(root_of(lab)), "an end of all rows", 30)


@contextmanager
def told_plainly() -> Iterator[None]:
    """What can go wrong in a lab, as CannotMeasure."""
    try:
        yield
    except (LabError, client.NoDaemon) as error:
        raise CannotMeasure(str(error)) from None


Measurement = Callable[[Wish, Progress], None]
