"""What users do wrong, or against krelay: it says what is wrong, and relaying goes on."""

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from tests.net.test_switching import traffic
from tests.net.world import GPORT, PYTHON, SERVICES, World, control_socket, echo, greet

pytestmark = pytest.mark.net


@pytest.fixture
def served(shared: World) -> Iterator[World]:
    """Relaying, and with a connection that must not be disturbed by anything."""
    world = shared
    with world.connect("client", 80) as idle:
        seen = greet(idle)
        assert seen.startswith(f"{world.client}:")
        yield world
        echo(idle, b"undisturbed")
    assert world.who("client", 80).startswith(f"{world.client}:")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")
    for program in (world.krelay_process, world.tcp_relay_process):
        assert program.poll() is None
        assert "Traceback" not in program.output


REFUSED = [
    ("gport", "abc", "'abc' is not a port (1-65535)"),
    ("gport", "70000", "'70000' is not a port (1-65535)"),
    ("gport", "80", "'80' is a relayed service port (tcp/80)"),
    (
        *("real_ip", "::1"),
        "'::1' is not an IPv4 address; write the server's IPv4 address, IPv6 is not relayed",
    ),
    ("real_ip", "10.77.3.2", "10.77.3.2 is an address of this host"),
    ("real_ip", "172.20.5.254", "172.20.5.254 is an address of this host"),
    ("real_ip", "127.0.0.1", "'127.0.0.1' is a loopback address (127.0.0.0/8), no server has it"),
    ("services", "tcp/80 tcp/22", "'tcp/22' would relay ssh, tcp/22; write tcp/22! if you mean it"),
    ("services", "http", "'http' is not a service (like tcp/80, udp/53 or tcp/8000-8100)"),
    ("services", f"tcp/{GPORT}", f"'tcp/{GPORT}' holds the gateway port, {GPORT}"),
    ("start", "yes", "'yes' is neither 0 nor 1"),
    ("source", "server", "'server' is neither client nor relay"),
    ("datapath", "kernel", "'kernel' is neither auto nor queue"),
    ("timeouts/udp", "0", "'0' is not a number of seconds (1-604800)"),
    ("limits/flows", "-1", "'-1' is not a number of flows (1-1000000)"),
    ("limits/new_flows_per_client", "many", "'many' is not a number of flows a second (0-1000000)"),
    ("limits/refusal", "icmp", "'icmp' is neither reset nor drop"),
]


def complains(world: World, line: str) -> bool:
    """Whether status/errors has this line."""
    return line in world.read("status/errors").splitlines()


def logs(world: World, line: str) -> bool:
    """Whether krelay's log has this reason."""
    said = world.logged()
    return "value refused" in said and line in said.replace('\\"', '"')


def put_back(world: World, name: str, value: str) -> None:
    """Waits until a setting shows this again; the reason is there by then."""
    world.until(lambda: world.read(name) == value, f"{name}={value}")


def test_a_bad_value_is_refused_with_the_reason_and_the_one_in_force_stays(
    served: World,
) -> None:
    for name, text, reason in REFUSED:
        before = served.read(name)
        served.write(name, text)
        line = f"{name}: {reason}; {before} stays in force"
        put_back(served, name, before)
        assert complains(served, line), served.read("status/errors")
        assert f"{name}={before}" in served.read("status/applied").splitlines()
        served.until(partial(logs, served, line), "a line of the log")
        assert served.who("client", 80).startswith(f"{served.client}:")
        served.put(None, **{name.replace("/", "__"): before})
    served.until(lambda: served.read("status/errors") == "", "no errors any more")


@pytest.mark.serial
def test_a_file_that_stays_empty_for_a_second_is_an_error(served: World) -> None:
    path = served.root / "real_ip"
    began = os.times().elapsed
    served.lab.run("relay", "sh", "-c", f": > {path}")
    served.until(lambda: served.read("status/errors"), "an error", timeout=4)
    took = os.times().elapsed - began

    assert 0.9 < took < 3
    assert served.read("status/errors").startswith("real_ip: ")
    assert served.read("status/errors").endswith(f"; {served.server} stays in force")
    put_back(served, "real_ip", served.server)


@pytest.mark.serial
def test_a_file_that_is_empty_for_a_moment_is_none(served: World) -> None:
    script = ": > $0/gport; sleep 0.3; echo 19000 > $0/gport"
    served.lab.run("relay", "sh", "-c", script, str(served.root))
    served.until(lambda: "gport=19000" in served.read("status/applied"), "gport=19000")

    assert served.read("status/errors") == ""


def test_a_gateway_port_that_another_program_has_is_refused_with_its_name(
    served: World,
) -> None:
    listen = "import socket; s = socket.create_server(('', 18500)); s.accept()"
    other = served.lab.start("relay", *PYTHON, "-c", listen)
    served.lab.wait_listening("relay", "tcp", 18500)
    served.write("gport", "18500")
    put_back(served, "gport", str(GPORT))

    assert served.read("status/errors") == (
        f"gport: port 18500 is in use by {comm(other.pid)} (pid {other.pid}); "
        f"{GPORT} stays in force"
    )
    served.who("client", 80)
    other.kill()
    other.wait()
    served.put(gport=18500)
    assert served.who("client", 80).startswith(f"{served.client}:")


def comm(pid: int) -> str:
    """The name of a program."""
    return Path(f"/proc/{pid}/comm").read_text().strip()


def test_a_second_krelay_on_the_same_tree_refuses_in_one_line(served: World) -> None:
    second = served.krelay("daemon", check=False)

    assert (second.status, second.stdout) == (1, "")
    assert second.stderr == (
        f"krelay daemon: another krelay serves {served.root}; stop it, or choose another tree "
        "with --root\n"
    )


def test_a_second_krelay_on_the_same_queue_says_that_it_is_taken(served: World) -> None:
    other = served.lab.directory / "taken"
    rules = served.rules()
    program = served.start_krelay(tree=other)
    served.put(tree=other, gport=GPORT + 1, real_ip=served.lab.address("server2"))
    served.write("start", "1", other)
    served.until(lambda: served.read("status/state", other).startswith("failed: "), "a failure")

    reason = served.read("status/state", other).removeprefix("failed: ")
    assert re.match(r"queue 1600 is served by another program", reason)
    command = (*PYTHON, "-m", "krelay", "start", "--root", str(other))
    started = served.lab.run("relay", *command, check=False)
    assert (started.status, started.stderr) == (
        1,
        "krelay start: queue 1600 is served by another program; "
        f"fix: krelay daemon --root {other} --queue-num 1601\n",
    )
    assert served.rules() == rules
    program.terminate()
    assert program.wait() == 0
    assert served.rules() == rules


def test_two_krelays_with_trees_and_queues_of_their_own_work_side_by_side(
    served: World,
) -> None:
    served.serve("server2", "tcp/8080", "udp/5353")
    other = served.lab.directory / "beside"
    rules = served.rules()
    first = served.start_krelay("--queue-num", "1601", tree=other)
    values = {"real_ip": served.lab.address("server2"), "services": "tcp/8080 udp/5353"}
    served.put(tree=other, gport=GPORT + 1, **values)
    second = served.start_tcp_relay(tree=other)
    served.put(tree=other, start=1)
    served.until_state("running", other)

    for port in (8080, 80):
        assert served.who("client", port).startswith(f"{served.client}:")
    for port in (5353, 7):
        assert served.who_udp("client", port).startswith(f"{served.client}:")
    assert {flow["gport"] for flow in served.flows("proto=tcp", other)} == {GPORT + 1}
    served.put(tree=other, start=0)
    served.until_state("stopped", other)
    assert served.rules() == rules
    for program in (first, second):
        program.terminate()
        assert program.wait() == 0


AS_NOBODY = (
    *PYTHON,
    "-c",
    # Loaded as root: this checkout may lie where no other user may read.
    "import os, sys\n"
    "from krelay.host import cleanup as clean; from krelay.cli import main as cli, up\n"
    "from krelay.control import client; from krelay.daemon import daemon\n"
    "os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
    "sys.exit(cli.main(sys.argv[1:]))",
)
"""A `krelay` command of a user without any rights."""


def test_no_root_no_daemon_and_one_clear_line(world: World) -> None:
    for words in (("daemon",), ("up", "--real-ip", world.server), ("start",), ("clean",)):
        done = world.lab.run("relay", *AS_NOBODY, *words, "--root", str(world.root), check=False)

        assert (done.status, done.stdout) == (1, ""), done
        assert len(done.stderr.splitlines()) == 1, done.stderr
        assert done.stderr.startswith(f"krelay {words[0]}: ")
    assert not world.root.exists()


def test_a_tree_that_cannot_be_made_is_one_clear_line(world: World) -> None:
    (world.lab.directory / "file").write_text("")
    for root in ("/proc/krelay", str(world.lab.directory / "file"), "/proc/1/x/y"):
        command = (*PYTHON, "-m", "krelay", "daemon", "--root", root)
        done = world.lab.run("relay", *command, check=False)

        assert done.status == 1
        assert done.stderr.startswith(f"krelay daemon: cannot create the file tree at {root}: ")
        assert len(done.stderr.splitlines()) == 1


def test_others_may_not_ask_or_register(served: World) -> None:
    done = served.lab.run("relay", *AS_NOBODY, "status", "--root", str(served.root), check=False)

    assert done.status == 1
    assert done.stderr.startswith(f"krelay status: no permission for {served.root}: ")
    assert len(done.stderr.splitlines()) == 1


GARBAGE = [
    (b"show nat proto=icmp\n", b"error: proto is tcp or udp, not 'icmp'\n\n"),
    (b"rm -rf /\n", b"error: 'rm' is no command; try help\n\n"),
    (b"kill 999999\n", b"error: no flow 999999; `show nat` lists them\n\n"),
    (b"flush now\n", b"error: 'now' isn't understood here; flush stands alone\n\n"),
    (b"kill x\n", b"error: kill takes the id of one flow, as `show nat` lists it\n\n"),
    (b"\0\xff\xfe\n", None),
    (b"\n", b"error: no command; try help\n\n"),
]


def test_garbage_on_the_control_socket_is_answered_by_an_error(served: World) -> None:
    with control_socket(served.root) as connection, connection.makefile("rb") as answers:
        for request, expected in GARBAGE:
            connection.sendall(request)
            line, end = answers.readline(), answers.readline()
            assert (line.startswith(b"error: "), end) == (True, b"\n")
            if expected is not None:
                assert line + end == expected
        connection.sendall(b"show config json\n")
        assert json.loads(answers.readline())["services"] == SERVICES


@pytest.mark.parametrize("newline", [b"", b"\n"])
def test_a_line_of_a_megabyte_is_an_error_and_the_end(served: World, newline: bytes) -> None:
    with control_socket(served.root) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(b"x" * (1 << 20) + newline)
        got = b""
        with suppress(ConnectionResetError):
            while data := connection.recv(4096):
                got += data
    assert got == b"error: a line has at most 4096 bytes\n\n"


def test_a_line_in_pieces_and_several_in_one_piece_are_answered_in_order(
    served: World,
) -> None:
    with control_socket(served.root) as connection, connection.makefile() as answers:
        for byte in b"show config":
            connection.sendall(bytes([byte]))
        connection.sendall(b"\nkill 0\n")
        connection.sendall(b"help")  # the last line may lack its end
        connection.shutdown(socket.SHUT_WR)
        config, error, commands, rest = answers.read().split("\n\n")
    assert f"services={SERVICES}" in config.splitlines()
    assert error == "error: no flow 0; `show nat` lists them"
    assert "kill ID" in commands.splitlines()
    assert rest == ""


MESSAGES = [
    b"garbage",
    b"\xff" * 100,
    b"{}",
    b"[]",
    b"null",
    b'{"op":"open"}',
    b'{"op":"open","id":1,"client":["10.0.0.1",70000],"gport":16000,"relay":["10.0.0.2",1]}',
    b'{"op":"open","id":"1","client":["10.0.0.1",1],"gport":16000,"relay":["10.0.0.2",1]}',
    b'{"op":"steal","id":1}',
    b"[" * 4000,
    b"x" * 100_000,
]


def test_garbage_on_the_relay_socket_is_answered_by_an_error_and_the_end(
    served: World,
) -> None:
    for message in MESSAGES:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
            link.settimeout(30)
            link.connect(str(served.root / "relay.sock"))
            link.send(message)
            answer = json.loads(link.recv(4096))
            assert answer["error"]
            assert link.recv(4096) == b""
        echo_of_traffic = served.who("client", 80)
        assert echo_of_traffic.startswith(f"{served.client}:")


def test_an_open_for_nobody_is_refused_and_the_link_stays(served: World) -> None:
    query = {"op": "open", "client": ["172.20.5.1", 1], "gport": GPORT}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as link:
        link.settimeout(30)
        link.connect(str(served.root / "relay.sock"))
        for number in (1, 2):
            link.send(json.dumps({**query, "id": number, "relay": ["10.77.3.2", 45678]}).encode())
            expected = {"id": number, "error": "no row for this client"}
            assert json.loads(link.recv(4096)) == expected


@pytest.mark.parametrize("request_line", [b"show nat\n" * 400, b"trace\n"])
def test_who_asks_and_never_reads_stalls_nobody(served: World, request_line: bytes) -> None:
    connections = []
    for _ in range(4):
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(served.root / "control.sock"))
        connection.sendall(request_line)
        connections.append(connection)
    try:
        for _ in range(50):
            assert served.who("client", 80).startswith(f"{served.client}:")
        served.download("client", 80, seed=1, size=20 << 20).finish()
        assert served.values("status")["state"] == "running"
        with traffic(served) as clients:
            served.until(lambda: clients.outcomes["_tcp fine"] > 100, "a hundred clients")
        assert clients.wrong == []
    finally:
        for connection in connections:
            connection.close()
    served.until(lambda: served.values("counters")["errors"] == 0, "no errors")


def test_more_control_clients_than_it_takes_disturb_nothing(served: World) -> None:
    connections = []
    try:
        for _ in range(100):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(str(served.root / "control.sock"))
            connections.append(connection)
        assert served.who("client", 80).startswith(f"{served.client}:")
    finally:
        for connection in connections:
            connection.close()
    served.until(lambda: _answers(served), "an answer")


def _answers(world: World) -> bool:
    try:
        return bool(world.ask("show status"))
    except (OSError, AssertionError):
        return False


def test_a_full_table_refuses_new_flows_and_leaves_live_ones_alone(served: World) -> None:
    served.put(limits__flows=len(served.flows()))
    sock = served.open("client")
    with pytest.raises(ConnectionRefusedError):
        sock.connect((served.relay, 80))
    udp = served.open("client", socket.SOCK_DGRAM)
    udp.connect((served.relay, 7))
    udp.send(b"who")
    with pytest.raises(OSError, match="No route to host"):
        udp.recv(1)  # what ICMP 3/13 is in Linux
    assert served.counted()["dropped_table_full"] >= 2
    served.put(limits__flows=100)
