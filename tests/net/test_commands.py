"""The commands as people type them: up, set, get, start, stop, status, nat, trace, clean."""

import json
import signal
import socket
from pathlib import Path

import pytest

from krelay_vm import Program
from tests.net.world import PYTHON, World, control_socket, greet

pytestmark = pytest.mark.net


def up(world: World, *options: str) -> Program:
    """`krelay up`, until it says that it relays."""
    given = ("--root", str(world.root), "--datapath", world.datapath, "--real-ip", world.server)
    values = (*given, "--gport", "18000", "--services", "tcp/80 udp/7")
    command = (*PYTHON, "-m", "krelay", "up", *values, *options)
    program = world.lab.start("relay", *command)
    world.until(lambda: "Ctrl-C ends it" in program.output or program.poll() is not None, "up")
    assert program.poll() is None, program.output
    return program


def children(program: Program) -> list[int]:
    """The pids of its children."""
    text = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text()
    return [int(pid) for pid in text.split()]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_relays_until_ctrl_c_and_leaves_the_host_as_before(world: World, number: int) -> None:
    world.serve("server", "tcp/80", "udp/7")
    before = world.rules()
    program = up(world)
    idle = world.connect("client", 80)
    assert greet(idle).startswith(f"{world.client}:")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")
    assert len(children(program)) == 2
    program.signal(number)

    assert program.wait() == 130
    with pytest.raises(ConnectionResetError):
        idle.recv(1)
    assert world.rules() == before
    assert not world.root.exists()
    assert "Traceback" not in program.output
    with pytest.raises(ConnectionRefusedError):
        world.connect("client", 80)


def test_up_that_is_killed_takes_both_with_it_and_leaves_no_rules(world: World) -> None:
    world.serve("server", "tcp/80")
    before = world.rules()
    program = up(world)
    world.who("client", 80)
    pids = children(program)
    program.kill()
    program.wait()

    world.until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), "both ended")
    assert world.rules() == before


def test_up_in_an_existing_tree_keeps_it_and_switches_off(world: World) -> None:
    world.serve("server", "tcp/80")
    world.start_krelay().terminate()
    world.krelay_process.wait()
    world.write("timeouts/udp", "77")
    program = up(world, "--source", "relay", "--datapath", "queue")
    assert world.who("client", 80).startswith(f"{world.relay}:")
    assert world.values("status")["datapath"] == "queue"
    program.signal(signal.SIGINT)

    assert program.wait() == 130
    assert (world.read("start"), world.read("timeouts/udp")) == ("0", "77")
    assert world.read("datapath") == "queue"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--real-ip", "::1"), "real_ip: '::1' is not an IPv4 address"),
        (("--gport", "0"), "gport: '0' is not a port (1-65535)"),
        (("--services", "tcp/22"), "services: 'tcp/22' would relay ssh"),
        (("--source", "me"), "source: 'me' is neither client nor relay"),
        (("--datapath", "kernel"), "datapath: 'kernel' is neither auto nor queue"),
        (("--real-ip", "10.77.3.2"), "10.77.3.2 is an address of this host"),
        (("--services", "tcp/16000"), "the gateway port"),
    ],
)
def test_up_with_a_bad_value_says_why_and_leaves_nothing(
    world: World, options: tuple[str, str], reason: str
) -> None:
    before = world.rules()
    command = (*PYTHON, "-m", "krelay", "up", "--root", str(world.root), *options)
    program = world.lab.start("relay", *command)

    assert program.wait(30) == 1
    assert program.output.splitlines()[-1].startswith("krelay up: ")
    assert reason in program.output
    assert "Traceback" not in program.output
    assert not world.root.exists()
    assert world.rules() == before


def test_set_get_start_stop_and_status(world: World) -> None:
    world.serve("server", "tcp/80")
    before = world.rules()
    world.start_krelay()
    for key, value in (
        ("real_ip", world.server),
        ("gport", "18000"),
        ("services", "tcp/80"),
        ("datapath", "queue"),
    ):
        done = world.krelay("set", key, value)
        assert (done.stdout, done.stderr) == ("", "")
        assert world.krelay("get", key).stdout == f"{value}\n"
        assert world.values("config")[key] == value
    world.start_tcp_relay()
    world.krelay("start")
    assert world.read("status/state") == "running"
    assert world.who("client", 80).startswith(f"{world.client}:")
    shown = world.krelay("get").stdout.splitlines()
    assert f"real_ip={world.server}" in shown
    assert "start=1" in shown
    status = json.loads(world.krelay("status", "--json").stdout)
    assert (status["state"], status["flows_tcp"]) == ("running", 1)
    assert (status["datapath"], status["queue"]) == ("queue", 1600)
    assert "running" in world.krelay("status").stdout
    assert json.loads(world.krelay("counters", "--json").stdout)["T1"] >= 3
    world.krelay("stop")
    assert world.read("status/state") == "stopped"
    assert world.rules() == before
    assert world.krelay("start").status == world.krelay("start").status == 0


def test_set_that_is_refused_is_one_line_and_changes_nothing(shared: World) -> None:
    world = shared
    for key, value in (
        ("gport", "abc"),
        ("gport", "80"),
        ("services", "tcp/22"),
        ("real_ip", world.relay),
    ):
        before = world.read(key)
        done = world.krelay("set", key, value, check=False)
        assert (done.status, done.stdout) == (1, "")
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("krelay set: ")
        assert world.read(key) == before


def test_wrong_usage_is_2_and_no_daemon_is_1(world: World) -> None:
    for words in (
        ("fly",),
        ("set", "gport"),
        ("set", "colour", "red"),
        ("daemon", "--queue-num", "x"),
    ):
        done = world.krelay(*words, check=False)
        assert done.status == 2
        assert "usage: krelay" in done.stderr
    for command in ("status", "nat", "counters", "trace", "start", "stop", "kill 1"):
        done = world.krelay(*command.split(), check=False)
        assert (done.status, done.stdout) == (1, "")
        assert done.stderr == (
            f"krelay {command.split()[0]}: no krelay serves {world.root}; start one with "
            "`krelay daemon` or `krelay up`\n"
        )


def test_nat_lists_flows_with_the_columns_of_the_contract(shared: World) -> None:
    world = shared
    sock = world.connect("client", 80, bind=40001)
    y = greet(sock).rpartition(":")[2]
    world.who_udp("client", 7, bind=40002)

    (tcp,) = world.ask("show nat proto=tcp")
    start = (
        f"proto=tcp state=established client={world.client}:40001 service={world.relay}:80 "
        f"gport=18000 relay={world.relay}:{y} server={world.server}:80 source=client age="
    )
    assert tcp.partition(" ")[2].startswith(start)
    (udp,) = world.ask("show nat proto=udp")
    assert udp.partition(" ")[2].startswith(
        f"proto=udp state=replied client={world.client}:40002 service={world.relay}:7 "
        f"server={world.server}:7 source=client age="
    )

    def counted() -> bool:
        (flow,) = world.flows("proto=udp")
        return bool(flow["packets"] == [1, 1])

    world.soon(counted, "a datagram each way")
    (flow,) = map(json.loads, world.krelay("nat", "proto=udp", "--json").stdout.splitlines())
    assert flow["packets"] == [1, 1]
    assert flow["bytes"] == [20 + 8 + 3, 20 + 8 + len(f"{world.client}:40002\n")]
    shown = world.krelay("nat", f"client={world.client}:40001").stdout
    assert "established" in shown
    assert "40002" not in shown
    assert world.flows("state=closed") == []
    assert len(world.flows("service=tcp/80")) == 1
    bad = world.krelay("nat", "proto=icmp", check=False)
    assert bad.status == 2
    assert bad.stderr.endswith("krelay nat: error: proto is tcp or udp, not 'icmp'\n")


def test_kill_ends_the_flow_that_it_names_and_no_other(shared: World) -> None:
    world = shared
    killed, other = world.connect("client", 80, bind=40001), world.connect("client", 80)
    seen = [greet(sock) for sock in (killed, other)]
    udp = world.open("client", socket.SOCK_DGRAM)
    world.exchange(udp, b"hello", (world.relay, 7))
    (flow,) = world.flows(f"client={world.client}:40001")
    (datagrams,) = world.flows("proto=udp")

    assert world.krelay("kill", str(flow["id"])).stdout == f"killed={flow['id']}\n"
    with pytest.raises(ConnectionResetError):
        killed.recv(1)
    at_server = seen[0].rpartition(":")[2]
    world.until(
        lambda: at_server not in world.lab.run("server", "ss", "-Htn", "state", "all").stdout,
        "the server's end gone",
    )
    assert world.krelay("kill", str(datagrams["id"])).stdout == f"killed={datagrams['id']}\n"
    assert world.flows("proto=udp") == []
    world.exchange(udp, b"a new row", (world.relay, 7))
    other.sendall(b"undisturbed")
    assert other.recv(100) == b"undisturbed"

    gone = world.krelay("kill", str(datagrams["id"]), check=False)
    assert (gone.status, gone.stdout) == (1, "")
    assert gone.stderr == (f"krelay kill: no flow {datagrams['id']}; `show nat` lists them\n")


def test_set_real_ip_with_flush_ends_the_flows_to_the_old_server(shared: World) -> None:
    world = shared
    second = world.lab.address("server2")
    before, udp = world.connect("client", 80), world.open("client", socket.SOCK_DGRAM)
    greet(before)
    world.exchange(udp, b"first", (world.relay, 7))
    wrong = world.krelay("set", "gport", "17000", "--flush", check=False)
    assert wrong.status == 2
    assert wrong.stderr.endswith("krelay set: error: --flush goes with real_ip alone\n")

    assert world.krelay("set", "real_ip", second).stdout == ""
    before.sendall(b"undisturbed")
    assert before.recv(100) == b"undisturbed"
    after = world.connect("client", 80)
    greet(after)
    (flow,) = world.flows("proto=udp")
    assert flow["server"] == f"{world.server}:7"
    world.exchange(udp, b"still the first", (world.relay, 7))

    assert world.krelay("set", "real_ip", second, "--flush").stdout == "flushed=2\n"
    with pytest.raises(ConnectionResetError):
        before.recv(1)
    world.exchange(udp, b"second", (world.relay, 7))
    (flow,) = world.flows("proto=udp")
    assert flow["server"] == f"{second}:7"
    after.sendall(b"undisturbed")
    assert after.recv(100) == b"undisturbed"
    assert world.krelay("set", "real_ip", second, "--flush").stdout == "flushed=0\n"


def test_trace_shows_each_packet_by_step_until_ctrl_c(shared: World) -> None:
    world = shared
    command = (*PYTHON, "-m", "krelay", "trace", "--root", str(world.root))
    program = world.lab.start("relay", *command, f"client={world.client}")
    world.until(lambda: _answered(world, program), "a traced packet")
    world.who("client", 80)
    world.who_udp("client2", 7)
    world.until(lambda: all(step in program.output for step in ("T1", "T2", "T3", "T4")), "steps")
    program.signal(signal.SIGINT)

    assert program.wait() == 130
    assert "Traceback" not in program.output
    assert f"{world.lab.address('client2')}:" not in program.output


def _answered(world: World, program: Program) -> bool:
    world.who_udp("client", 7)
    return "U1" in program.output


def test_clean_removes_what_a_killed_krelay_left(world: World) -> None:
    world.serve("server", "tcp/80")
    before = world.rules()
    world.begin()
    running = world.krelay("clean", check=False)
    assert running.status == 1
    assert running.stderr == (
        f"krelay clean: a krelay serves {world.root}; stop it with SIGTERM instead\n"
    )
    world.kill(world.krelay_process)
    world.kill(world.tcp_relay_process)
    assert world.rules() != before
    done = world.krelay("clean")

    assert "removed rules of krelay-" in done.stdout
    assert f"removed file tree {world.root}" in done.stdout
    assert world.rules() == before
    assert not world.root.exists()
    assert world.krelay("clean").stdout == "nothing was left\n"
    with pytest.raises(ConnectionRefusedError):
        world.connect("client", 80)


def test_a_killed_krelay_that_is_not_to_run_again_takes_its_rules_out_at_its_next_start(
    world: World,
) -> None:
    before = world.rules()
    world.begin()
    world.kill(world.krelay_process)
    assert world.rules() != before
    (world.root / "start").write_text("0\n")
    world.start_krelay()

    assert world.rules() == before
    assert world.read("status/state") == "stopped"


def test_a_tree_that_says_start_is_honoured_at_the_start(world: World) -> None:
    world.serve("server", "tcp/80")
    world.root.mkdir()
    for name, text in (("real_ip", world.server), ("gport", "18000"), ("start", "1")):
        world.write(name, text)
    world.start_krelay()
    world.start_tcp_relay()

    assert world.read("status/state") == "running"
    assert world.who("client", 80).startswith(f"{world.client}:")
    assert oct((world.root).stat().st_mode & 0o777) == "0o755"
    assert oct((world.root / "gport").stat().st_mode & 0o777) == "0o644"


def test_a_person_can_type_at_the_control_socket(shared: World) -> None:
    world = shared
    world.put(start=0)
    world.until_state("stopped")
    script = f"echo 'show status' | socat - UNIX-CONNECT:{world.root}/control.sock"
    lines = world.lab.run("relay", "sh", "-c", script).stdout.split("\n")

    assert lines[0] == "state=stopped"
    assert lines[-2:] == ["", ""]
    with control_socket(world.root) as connection:
        connection.sendall(b"help\n")
        connection.shutdown(socket.SHUT_WR)
        assert b"show nat" in connection.recv(4096)
