"""DNS by way of the relay: queries and answers per second, and how many are lost.

The server is NSD, which answers from memory.  Asked twice: by dnsperf, whose sockets keep their
ports (it has up to 256), and by asker.py, each query from a new port.  The first finds its flows
made; the second needs a new flow for each query, as resolvers do that choose a port each time.

Each way has a lab of its own.  Nothing is pinned: client, relay and server share the cores.
"""

import re
import socket
from contextlib import ExitStack
from typing import NamedTuple

from benchmarks import asker, ground, paths, sender
from benchmarks.figures import Goal
from benchmarks.ground import AUTO, DATAPATHS, QUEUE, CannotMeasure, Progress, Wish
from benchmarks.paths import DNAT, FORWARD
from benchmarks.sender import ADDRESSES
from krelay_vm import Lab

TITLE = "DNS, questions and answers per second"
NEW, KEPT = "{}: a new port each", "{}: dnsperf, ports kept"
LOST_NEW, LOST_KEPT = "{}: lost, a new port each", "{}: lost, dnsperf"
UNIT, LOST_UNIT = "queries/s", "%"
NEEDS = ("nsd", "dnsperf", "dig")
GOALS = (
    Goal(
        "krelay to no relay, a new port each", NEW.format(AUTO), NEW.format(FORWARD), at_least=0.7
    ),
    Goal("krelay to conntrack DNAT, a new port each", NEW.format(AUTO), NEW.format(DNAT)),
    Goal(
        "krelay's queue path to no relay, a new port each",
        NEW.format(QUEUE),
        NEW.format(FORWARD),
        at_least=0.3,
    ),
    Goal("krelay to no relay, dnsperf", KEPT.format(AUTO), KEPT.format(FORWARD), at_least=0.7),
    Goal("krelay's queue path to no relay, dnsperf", KEPT.format(QUEUE), KEPT.format(FORWARD)),
)
PORTS = 256
"""dnsperf's most for one thread."""
FLOW_SECONDS = 1
"""So that in a reading flows end as fast as new ones come, as they do where load lasts."""
_WARM_UP = FLOW_SECONDS + ground.WARM_UP
_ZONE = """\
$ORIGIN {domain}.
$TTL 60
@ SOA ns hostmaster 1 3600 600 86400 60
@ NS ns
ns A {server}
{name} A {address}
"""
_CONFIG = """\
server:
    ip-address: {server}
    username: ""
    server-count: 1
    zonesdir: "{directory}"
    database: ""
    zonelistfile: "{directory}/nsd.zones"
    pidfile: "{directory}/nsd.pid"
    xfrdfile: "{directory}/nsd.xfrd"
    xfrdir: "{directory}"
    rrl-ratelimit: 0
remote-control:
    control-enable: no
zone:
    name: {domain}
    zonefile: zone
"""
_UNHEARD = """\
table ip asker {{
    chain prerouting {{
        type filter hook prerouting priority raw
        ip daddr {{ {clients} }} udp sport 53 drop
    }}
}}
"""
"""asker.py has no sockets: the kernel would refuse the answers."""
_COMPLETED = re.compile(r"^\s*Queries completed:\s+(\d+)", re.MULTILINE)
_LOST = re.compile(r"^\s*Queries lost:\s+(\d+)", re.MULTILINE)
_PER_SECOND = re.compile(r"^\s*Queries per second:\s+([\d.]+)$", re.MULTILINE)
_CODES = re.compile(r"^\s*Response codes:\s+NOERROR (\d+) \(100\.00%\)$", re.MULTILINE)


class Load(NamedTuple):
    """What a run of queries came to."""

    per_second: float
    """Answers."""
    lost: float
    """Percent of the queries."""


def about() -> tuple[str, ...]:
    """How it was measured."""
    return (
        f"Server: NSD, one process, one record. {asker.UNDER_WAY} questions are under way at a "
        f"time. `dnsperf -c {PORTS}`: as many ports as its one thread can have, used over and "
        "over; so rows stay. *A new port each*: every question is the first packet of a new flow, "
        f"from ports of {ADDRESSES} addresses. dnsperf can't do that: a program of ours "
        "sends packets made beforehand, without sockets. It costs less than clients in earnest "
        f"do, and hides less of what a relay costs. Rows live {FLOW_SECONDS} s, the kernel's "
        "connection tracking's too, and counting begins after that: as many end as begin. Lost: "
        "not answered within a second. All share the cores.",
    )


def measure(wish: Wish, progress: Progress) -> None:
    """Takes the readings."""
    if missing := ground.missing(NEEDS):
        progress.leave_out(f"{TITLE}: {missing} isn't there")
        return
    with ground.told_plainly(), ExitStack() as stack:
        ways: list[tuple[str, Lab, str]] = []
        for name in paths.WAYS:
            progress.say(f"setting up {name}")
            lab = stack.enter_context(Lab())
            ways.append((name, lab, set_up(lab, name)))
        for turn in range(wish.rounds):
            for ask, rate, lost in ((dnsperf, KEPT, LOST_KEPT), (new_ports, NEW, LOST_NEW)):
                for name, lab, to in ways:
                    load = ask(lab, to, wish.seconds)
                    progress.take(turn, wish.rounds, rate.format(name), UNIT, load.per_second)
                    progress.take(turn, wish.rounds, lost.format(name), LOST_UNIT, load.lost)
                    if name in DATAPATHS:
                        ground.flows_ended(lab)


def set_up(lab: Lab, way: str) -> str:
    """The way, seen to work, with a server behind it; the address that is asked."""
    to = paths.prepare(lab, way, paths.DNS, timeout=FLOW_SECONDS, settings=ground.NO_LIMITS)
    ground.check_udp(lab, to, paths.DNS)
    directory, server = lab.directory, lab.address("server")
    name, _, domain = asker.NAME.partition(".")
    address = socket.inet_ntoa(asker.ADDRESS)
    zone = _ZONE.format(domain=domain, server=server, name=name, address=address)
    (directory / "zone").write_text(zone)
    config = directory / "nsd.conf"
    config.write_text(_CONFIG.format(server=server, directory=directory, domain=domain))
    lab.start("server", "nsd", "-d", "-c", str(config))
    lab.wait_listening("server", "udp", paths.DNS)
    (directory / "questions").write_text(f"{asker.NAME} A\n")
    clients = [sender.endpoint(lab.address("client"), number)[0] for number in range(ADDRESSES)]
    for each in clients:
        lab.run("client", "ip", "address", "add", f"{each}/24", "dev", "eth0")
    lab.run("client", "nft", "-f", "-", input=_UNHEARD.format(clients=", ".join(clients)))
    answer = lab.run("client", "dig", "+short", "+time=1", f"@{to}", asker.NAME).stdout.strip()
    if answer != address:
        raise CannotMeasure(f"{way}: the answer to dig is {answer!r}, not {address}")
    return to


def dnsperf(lab: Lab, to: str, seconds: float, most: int | None = None) -> Load:
    """dnsperf's own queries, as many a second as it can, or `most`."""
    data = str(lab.directory / "questions")
    whole = max(1, round(seconds))
    fixed = ("-c", str(PORTS), "-q", str(asker.UNDER_WAY), "-t", f"{asker.PATIENCE:g}")
    pace = () if most is None else ("-Q", str(most))
    command = ("dnsperf", "-s", to, "-d", data, "-l", str(whole), *pace, *fixed)
    return parse_dnsperf(lab.run("client", *command, timeout=whole + 20).stdout)


def parse_dnsperf(text: str) -> Load:
    """Reads what dnsperf prints at its end.  Raises CannotMeasure, also for an answer that is none.

    The dnsperf of Debian 12 and 13.
    """
    completed, lost, rate, codes = (
        each.search(text) for each in (_COMPLETED, _LOST, _PER_SECOND, _CODES)
    )
    if not (completed and lost and rate and codes and int(completed[1])):
        raise CannotMeasure(f"dnsperf doesn't tell of answers: {text.strip()[-300:]}")
    return Load(float(rate[1]), _percent(int(lost[1]), int(completed[1])))


def new_ports(lab: Lab, to: str, seconds: float) -> Load:
    """Queries from a new port each."""
    client = lab.address("client")
    what = (to, str(paths.DNS), client, str(_WARM_UP), str(seconds))
    command = (*ground.PYTHON, asker.__file__, *what)
    result = lab.run("client", *command, timeout=seconds + 30, env=ground.WITH_BENCHMARKS)
    answered, lost, wrong, took = result.stdout.split()
    if int(wrong) or not int(answered):
        raise CannotMeasure(f"{answered} right answers and {wrong} wrong ones from {to}")
    return Load(int(answered) / float(took), _percent(int(lost), int(answered)))


def _percent(lost: int, answered: int) -> float:
    return 100 * lost / (lost + answered)
