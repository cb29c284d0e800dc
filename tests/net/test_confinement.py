"""What the daemons may do once they serve, as the kernel shows it; and that it is enough."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.net.test_children import status
from tests.net.world import PYTHON, World, greet

pytestmark = pytest.mark.net

HERE = Path(__file__).parents[2]
NEEDED = 1 << 12 | 1 << 13 | 1 << 39
"""CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF (linux/capability.h)."""


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def assert_confined(pid: int, capabilities: int) -> None:
    """All threads of it."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            text = (task / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # one that closes a descriptor, and ends
            assert int(task.name) != pid
            continue
        lines = (line.partition(":") for line in text.splitlines())
        found = {name: value.split() for name, _, value in lines}
        held = [int(found[kind][0], 16) for kind in ("CapPrm", "CapEff", "CapBnd")]
        assert held == [capabilities] * 3
        assert found["NoNewPrivs"] == ["1"]


def test_krelay_keeps_three_capabilities_and_relays_with_them(world: World) -> None:
    for host in ("server", "server2"):
        world.serve(host, "tcp/80", "udp/7")
    before = world.rules()
    world.begin()
    pid = world.krelay_process.pid
    assert_confined(pid, NEEDED)
    first = world.connect("client", 80)
    assert greet(first).startswith(f"{world.client}:")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")

    # Whatever it does later.
    world.put(gport=18001)
    world.until(lambda: world.who("client", 80), "the new gateway port")
    world.put(real_ip=world.lab.address("server2"), services="tcp/80 udp/7 udp/53")
    assert world.who("client", 80).startswith(f"{world.client}:")
    world.lab.run("relay", "nft", "flush", "ruleset")
    world.until(lambda: "they are put back" in world.krelay_process.output, "rules again")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")
    world.root.rename(world.root.with_name("taken-away"))
    world.until(lambda: world.answers(world.root), "the tree again")
    world.until(lambda: world.values("status")["tcp_relays"] == 1, "tcp-relay again")
    assert world.who("client", 80).startswith(f"{world.client}:")
    for flag, state in ((0, "stopped"), (1, "running"), (0, "stopped")):
        world.put(start=flag)
        world.until_state(state)
    assert world.rules() == before
    assert_confined(pid, NEEDED)
    world.put(start=1)
    world.until_state("running")
    world.krelay_process.terminate()
    assert world.krelay_process.wait() == 0
    assert world.rules() == before
    assert "Traceback" not in world.krelay_process.output


def test_a_krelay_that_takes_over_keeps_no_more(world: World) -> None:
    world.serve("server", "tcp/80")
    world.begin()
    held = world.connect("client", 80)
    greet(held)
    world.kill(world.krelay_process)
    world.start_krelay()
    assert_confined(world.krelay_process.pid, NEEDED)
    held.sendall(b"still there")
    assert held.recv(100) == b"still there"


@pytest.mark.one_datapath("nothing is relayed")
def test_it_still_knows_who_has_the_gateway_port(world: World) -> None:
    """A program of another user, which krelay itself can't look into any more."""
    world.start_krelay()
    code = "import socket, time; s = socket.create_server(('', 18500)); time.sleep(60)"
    other = world.lab.start(
        *("relay", "setpriv", "--reuid=61300", "--regid=61300", "--clear-groups"),
        *("/usr/bin/python3", "-c", code),
    )
    world.lab.wait_listening("relay", "tcp", 18500)
    world.write("gport", "18500")
    world.until(lambda: "18500" in world.read("status/errors"), "a refusal")
    assert f"port 18500 is in use by python3 (pid {other.pid})" in world.read("status/errors")


@pytest.mark.one_datapath("who may what doesn't depend on it")
@pytest.mark.parametrize("options", [(), ("--workers", "2")])
def test_what_relays_makes_few_system_calls(world: World, options: tuple[str, ...]) -> None:
    world.serve("server", "tcp/80")
    world.start_krelay()
    world.put(gport=18000, services="tcp/80", real_ip=world.server)
    program = world.lab.start(
        "relay", *PYTHON, "-m", "tcp_relay", "--root", str(world.root), *options
    )
    workers = 2 if options else 1
    world.until(lambda: int(world.values("status")["tcp_relays"]) == workers, "all connected")
    world.put(start=1)
    world.until_state("running")
    pids = children(program.pid) or [program.pid]
    for pid in pids:
        assert status(pid)["Seccomp"] == ["2"]
    assert world.who("client", 80).startswith(f"{world.client}:")
    if options:  # one that dies is replaced by one under the same filter
        os.kill(pids[0], signal.SIGKILL)
        world.until(lambda: len(set(children(program.pid)) - set(pids)) == 1, "another worker")
        (new,) = set(children(program.pid)) - set(pids)
        gone = f"tcp-relay disconnected pid={pids[0]}"  # until then krelay holds its listener open
        world.until(lambda: gone in world.krelay_process.output, "its end to be seen")
        world.until(lambda: status(new)["Seccomp"] == ["2"], "its filter")
        world.until(lambda: int(world.values("status")["tcp_relays"]) == workers, "all connected")
        assert world.who("client", 80).startswith(f"{world.client}:")
    program.terminate()
    assert program.wait() == 0
    assert "Traceback" not in program.output


@pytest.mark.one_datapath("there is no krelay")
@pytest.mark.parametrize("name", ["10.77.3.1", "localhost"])
def test_tcpproxy_too_and_looks_names_up(world: World, name: str) -> None:
    where = "server" if name != "localhost" else "relay"
    world.serve(where, "tcp/80")
    program = world.lab.start("relay", *PYTHON, "-m", "tcp_relay.tcpproxy", name, "80", "81")
    world.lab.wait_listening("relay", "tcp", 81)
    for _ in range(3):
        assert world.who("client", 81)
        assert status(program.pid)["Seccomp"] == ["2"]
    program.terminate()
    assert program.wait() == 0
    assert "Traceback" not in program.output


@pytest.mark.one_datapath("there is no krelay")
def test_the_filter_can_be_left_out(world: World) -> None:
    argv = (*PYTHON, "-m", "tcp_relay.tcpproxy", world.server, "80", "81", "--no-seccomp")
    program = world.lab.start("relay", *argv)
    world.lab.wait_listening("relay", "tcp", 81)
    assert status(program.pid)["Seccomp"] == ["0"]


@pytest.mark.one_datapath("there is no krelay")
def test_without_libseccomp_it_relays_and_says_so(world: World) -> None:
    world.serve("server", "tcp/80")
    hide = (
        "for f in $(ldconfig -p | sed -n 's/.*=> //p' | grep libseccomp.so.2); "
        "do mount --bind /dev/null $f; done"
    )
    proxy = shlex.join((*PYTHON, "-m", "tcp_relay.tcpproxy", world.server, "80", "81"))
    program = world.lab.start("relay", "unshare", "--mount", "sh", "-c", f"{hide}; exec {proxy}")
    world.lab.wait_listening("relay", "tcp", 81)
    assert world.who("client", 81)
    assert status(program.pid)["Seccomp"] == ["0"]
    assert "system calls aren't filtered" in program.output
    assert "fix=" in program.output


WORKERS = """
import os, sys, time
from knet import log, seccomp, syscalls
from tcp_relay.service import workers
log.set_up()
def serve(index, ready):
    seccomp.load(syscalls.allowed("tcp-relay"), syscalls.DEADLY)
    ready()
    time.sleep(0.3)
    os.execv("/bin/true", ["true"])
workers.run(2, serve, grace=1)
"""


@pytest.mark.one_datapath("there is no krelay")
def test_a_worker_that_is_killed_for_a_call_is_named_and_replaced() -> None:
    command = ("timeout", "1.5", sys.executable, "-c", WORKERS)
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=20)
    assert "signal=SIGSYS" in done.stderr
    assert done.stderr.count("worker started") > 2


WAYS = """
import json, os, sys
from knet.rules.run import RulesUnavailable
from krelay.host import netfilter
from knet import privileges
from krelay.datapath.nfqueue import Queue, QueueUnavailable
from knet.rawsocket import RawSender
from random import Random
from knet.rules.run import RulesUnavailable
from knet.rules.watch import RuleWatcher
from krelay.nat.table import NatTable
from krelay.datapath.worker import Worker
spec, kept = netfilter._PROBE, json.loads(sys.argv[1])
if kept is not None:
    privileges.give_up(kept, for_programs=True)
found = []
for backend in netfilter.CANDIDATES:
    try:
        rules = spec if backend.has_maps else netfilter._PROBE_WITHOUT_MAPS
        backend.install(rules)
        seen = [backend.present(rules.name), backend.intact(rules)]
        backend.remove(rules.name)
        found.append([backend.name, *seen, backend.present(rules.name)])
    except RulesUnavailable:
        pass
def works(make):
    try:
        make().close()
    except (OSError, QueueUnavailable):
        return False
    return True
found.append(["queue", works(lambda: Queue(9, Worker(NatTable(rng=Random(1))), print))])
found.append(["raw packets", works(RawSender)])
found.append(["news of rules", works(RuleWatcher)])
print(json.dumps(found))
"""


def ways(world: World, kept: str) -> list[Any]:
    """What works in the relay host with these capabilities alone; `null`: with all of root's."""
    code = f"import sys; sys.path.insert(0, {str(HERE)!r})\n{WAYS}"
    found: list[Any] = json.loads(world.run("relay", sys.executable, "-c", code, kept))
    return found


@pytest.mark.one_datapath("rules are only tried")
def test_two_capabilities_are_as_good_as_all_for_rules_queue_and_packets(world: World) -> None:
    with_all = ways(world, "null")
    assert with_all[-3:] == [["queue", True], ["raw packets", True], ["news of rules", True]]
    assert len(with_all) > 3
    assert ways(world, "[12, 13]") == with_all


@pytest.mark.one_datapath("rules are only tried")
def test_neither_of_the_two_can_be_done_without(world: World) -> None:
    without_raw = ways(world, "[12]")
    assert ["raw packets", False] in without_raw
    assert ["queue", True] in without_raw
    assert ways(world, "[13]") == [
        ["queue", False],
        ["raw packets", True],
        ["news of rules", False],
    ]


@pytest.mark.parametrize(
    "wrapped",
    [
        ("-Urn",),  # setgroups is denied where one is root of a user namespace of one's own
        ("-n", "setpriv", "--bounding-set", "-setgid", "--inh-caps", "-setgid"),
        ("-n", "setpriv", "--bounding-set", "-setpcap", "--inh-caps", "-setpcap"),
        (
            "-Urn",
            "sh",
            "-c",
            'echo 0 > /proc/sys/user/max_inotify_instances; exec "$@"',
            "-",
        ),
    ],
    ids=["user namespace", "no CAP_SETGID", "no CAP_SETPCAP", "no inotify"],
)
def test_krelay_serves_with_less_than_all_of_root(wrapped: tuple[str, ...], tmp_path: Path) -> None:
    """As in a container: what can't be given up is said, and is no reason not to begin."""
    root, log = tmp_path / "run", tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            ("unshare", *wrapped, *PYTHON, "-m", "krelay", "daemon", "--root", str(root)),
            stderr=out,
            cwd=HERE,
            start_new_session=True,
        )
    try:
        give_up = time.monotonic() + 20
        while not (root / "control.sock").exists() or not (root / "status/state").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up
            time.sleep(0.02)
        assert (root / "status/state").read_text() == "stopped\n"
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()
