"""What all tests share: which of them this machine can run, and a guard over the host they run on.

Tests marked `net` build their own network namespaces. Two things could go wrong without anyone
seeing it: that they don't run at all, and that they change the host's own network. So the first
is told with its reason, and the second is looked for: rules, links, addresses, routes, namespaces
and /run are written down before the first test and compared after the last. The comparison waits
a little, because the kernel takes links of a dead namespace away in its own time; what is still
different then is an error of the run.  Labs of other programs that run meanwhile are none of ours.
"""

import functools
import gc
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import pytest
from hypothesis import settings

from krelay_vm import Host, Lab, LabError, Topology, kernels, program, registry
from tests.tools import apart, prefork

# A shared machine may be slow at any moment, so no example has a deadline (pytest-timeout holds the
# whole test); and a run of CI that is repeated does the same again.
settings.register_profile("krelay", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("krelay")

SETTLE = 5.0  # seconds

LONGEST = (
    "net/test_failing_calls.py",
    "net/test_stopped.py",
    "net/test_cut_off.py",
    "net/test_resources.py",
    "tcp_relay/test_failing_calls.py",
    "net/test_wrong_setups.py",
    "net/test_growth.py",
    "net/test_relay_ports.py",
    "net/test_firewall_tools.py",
    "net/test_arriving.py",
    "net/test_failed.py",
    "net/test_up.py",
    "net/test_slow_peers.py",
    "net/test_tprox.py",
    "net/test_trees.py",
    "net/test_gateway_port.py",
    "net/test_own_flows.py",
    "net/test_floods.py",
    "net/test_datapaths.py",
    "net/test_faults.py",
    "net/test_dscp.py",
    "test_tprox.py",
    "net/test_full_tables.py",
    "net/test_flushed_rules.py",
    "tcp_relay/test_hostile.py",
    "net/test_children.py",
    "net/test_starting.py",
    "net/test_fast_path.py",
    "benchmarks/test_dns.py",
    "net/test_commands.py",
    "net/test_forward.py",
    "net/test_doctor_asked.py",
    "net/test_doctor.py",
    "tcp_relay/test_descriptors.py",
    "net/test_tracking_timers.py",
    "net/test_gone_peers.py",
    "benchmarks/test_flows.py",
    "net/test_refusals.py",
    "net/test_relaying.py",
    "krelay/demo/test_play.py",
    "net/test_uplinks.py",
    "net/test_user_namespaces.py",
)
"""Files whose tests take 30 seconds or more, the longest first; the last run's figures are in the
cache (`durations`)."""
_BEGAN = pytest.StashKey[float]()
KEPT = os.environ.pop("KRELAY_KEPT", None)  # runs that tests make leave nothing there
"""The folder where a run leaves how long each test took, and why some were skipped."""

BIND_A_QUEUE = (
    "from netfilterqueue import NetfilterQueue as Q; q = Q(); q.bind(0, print); q.unbind()"
)

# Each command prints a part of the host's network that no test may change.
HOST = {
    "links": ("ip", "-o", "link"),
    "addresses": ("ip", "-o", "addr"),
    "routes": ("ip", "-o", "-4", "route", "show", "table", "all"),
    "routing rules": ("ip", "-o", "rule"),
    "namespaces": ("ip", "netns", "list"),
    "forwarding": ("sysctl", "-n", "net.ipv4.ip_forward"),
    "iptables rules": ("iptables-save",),
    "nftables rules": ("nft", "list", "ruleset"),
}

# Parts of those lines that move by themselves: counters, lifetimes, the time of day.
RESTLESS = re.compile(
    r"\[\d+:\d+\]"
    r"|packets \d+ bytes \d+"
    r"|(?:valid|preferred)_lft \S+"
    r"|expires \S+"
    r"|^#.*",
    re.MULTILINE,
)


def _failure(command: tuple[str, ...]) -> str | None:
    """Why this command fails, in one line, or None if it doesn't."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


@functools.cache
def why_no_net() -> str | None:
    """The reason why this machine can't run `net` tests, or None if it can."""
    if os.geteuid() != 0:
        return "needs root"
    if reason := _failure(("unshare", "-n", "true")):
        return f"no network namespace can be made here: {reason}"
    if reason := _failure(("unshare", "-n", sys.executable, "-c", BIND_A_QUEUE)):
        return f"no netfilter queue can be bound here: {reason}"
    return None


@functools.cache
def why_no_vm() -> str | None:
    """The reason why this machine can't run `vm` tests, or None if it can."""
    return why_no_net() or kernels.why_not("uml") or _why_uml_doesnt_boot()


def _why_uml_doesnt_boot() -> str | None:
    """What is installed may still not run: it traces its processes, and not everyone may."""
    try:
        with Lab(Topology(hosts=(Host("probe"),), links=()), backends="uml"):
            return None
    except LabError as error:
        first, *_, last = [*str(error).splitlines(), ""]
        return f"{first} {last.strip()}".strip()


@functools.cache
def why_no_qemu() -> str | None:
    """The reason why this machine can't run `qemu` tests, or None if it can."""
    return why_no_net() or kernels.why_not("qemu")


class Doctests:
    """What has no examples needn't be loaded to look for them."""

    @pytest.hookimpl(wrapper=True)
    def pytest_collect_file(
        self, file_path: Path
    ) -> Generator[None, list[pytest.Collector], list[pytest.Collector]]:
        found = yield
        if found and b">>> " not in file_path.read_bytes():
            return [each for each in found if type(each).__name__ != "DoctestModule"]
        return found


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Doctests())
    gc.disable()  # until all is collected: most of that stays
    if hasattr(config, "workerinput"):  # one of several processes (pytest-xdist)
        apart.enter()


def pytest_collection_finish() -> None:
    """What was loaded stays: the garbage collector needn't walk through it again and again."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole files that take long begin first, so that several processes end together."""
    here = Path(__file__).parent
    rank = {here / name: number for number, name in enumerate(LONGEST)}
    if missing := [path for path in rank if not path.exists()]:
        raise pytest.UsageError(f"LONGEST of tests/conftest.py names what isn't there: {missing}")
    items.sort(key=lambda item: (rank.get(item.path, len(rank)), "net" not in item.path.parts))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    item.stash[_BEGAN] = _cpu()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Its end is told with what it used of the processor; so did what it started and waited for."""
    report = yield
    if report.when == "teardown":
        report.user_properties.append(("cpu", _cpu() - item.stash[_BEGAN]))
    return report


def _cpu() -> float:
    """Seconds of this process, and of all that it, or prefork's servers, started and waited for."""
    return sum(os.times()[:4]) + prefork.cpu()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Adds to what earlier stages have left: what each test took, and why tests were skipped."""
    if KEPT is not None:
        reports = [
            report
            for report in chain.from_iterable(terminalreporter.stats.values())
            if isinstance(report, pytest.TestReport)
        ]
        _keep_durations(Path(KEPT, "durations"), reports)
        _keep_reasons(Path(KEPT, "skipped"), reports)


def _keep_durations(file: Path, reports: Iterable[pytest.TestReport]) -> None:
    """The longest first: seconds, those of the processor among them, and the test."""
    seconds, cpu = defaultdict[str, float](float), defaultdict[str, float](float)
    for line in file.read_text().splitlines() if file.exists() else ():
        took, used, test = line.split(maxsplit=2)
        seconds[test], cpu[test] = float(took), float(used)
    for report in reports:
        seconds[report.nodeid] += report.duration
        cpu[report.nodeid] += sum(
            float(str(used)) for what, used in report.user_properties if what == "cpu"
        )
    longest = sorted(seconds, key=lambda test: seconds[test], reverse=True)
    lines = [f"{seconds[test]:8.2f} {cpu[test]:8.2f} {test}" for test in longest]
    file.write_text("".join(f"{line}\n" for line in lines))


def _keep_reasons(file: Path, reports: Iterable[pytest.TestReport]) -> None:
    """How many were skipped for each reason."""
    reasons = Counter[str]()
    for line in file.read_text().splitlines() if file.exists() else ():
        count, reason = line.split(maxsplit=1)
        reasons[reason] = int(count)
    for report in reports:
        if report.skipped and isinstance(report.longrepr, tuple):
            reasons[report.longrepr[2].removeprefix("Skipped: ")] += 1
    file.write_text("".join(f"{count:6} {reason}\n" for reason, count in reasons.most_common()))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for mark, why_not in (("net", why_no_net), ("vm", why_no_vm), ("qemu", why_no_qemu)):
        if item.get_closest_marker(mark) and (reason := why_not()):
            pytest.skip(reason)


def _printed(command: tuple[str, ...]) -> frozenset[str]:
    """The lines this command prints, without their restless parts; none if it isn't installed."""
    if shutil.which(command[0]) is None:
        return frozenset()
    text = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    return frozenset(line.strip() for line in RESTLESS.sub("", text).splitlines() if line.strip())


def host_network() -> dict[str, frozenset[str]]:
    """The host's network as it is now: part -> lines."""
    host = {part: _printed(command) for part, command in HOST.items()}
    host["files"] = frozenset(
        str(path)
        for top in Path("/run").glob("krelay*")
        for path in (top, *(top.rglob("*") if top.is_dir() else ()))
        if path != registry.DIRECTORY  # there as long as there is a lab, whoever's
    )
    return host


def differences(
    before: Mapping[str, frozenset[str]], after: Mapping[str, frozenset[str]]
) -> list[str]:
    """One line for each line that came (+) or went (-), with the part it belongs to."""
    return [
        f"{part}: {sign} {line}"
        for part in before
        for sign, lines in (
            ("+", after[part] - before[part]),
            ("-", before[part] - after[part]),
        )
        for line in sorted(lines)
    ]


def labs_of_others() -> set[str]:
    """The names of labs whose owner is alive and was not started by this run."""
    owners = {record.name: record.owner for record in registry.records()}
    return {
        name for name, owner in owners.items() if owner and owner.alive and not _is_ours(owner.pid)
    }


def _is_ours(pid: int) -> bool:
    """Whether this process is this run's own, or was started by it."""
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        except OSError:
            return False
        pid = int(stat.rpartition(")")[2].split()[1])
    return False


@pytest.fixture(scope="session", autouse=True)
def programs_are_forked() -> Iterator[None]:
    """What labs start most often is forked from processes that have loaded it (prefork.py)."""
    if os.environ.get("KRELAY_EXEC"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "POPEN", prefork.Popen)
        yield
        prefork.close()


@pytest.fixture(scope="session", autouse=True)
def host_network_stays_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails the run, after its last test, if `net` tests left a trace on the host's own network."""
    marks = ("net", "vm", "qemu")
    needs_net = any(item.get_closest_marker(m) for item in request.session.items for m in marks)
    if not needs_net or why_no_net():
        yield
        return
    before, others = host_network(), labs_of_others()
    yield
    give_up = time.monotonic() + SETTLE
    while True:
        others |= labs_of_others()
        changed = [
            line
            for line in differences(before, host_network())
            if not any(name in line for name in others)
        ]
        if not changed or time.monotonic() >= give_up:
            break
        time.sleep(0.1)
    if changed:
        pytest.fail(
            "the tests changed the host's own network:\n  " + "\n  ".join(changed), pytrace=False
        )
