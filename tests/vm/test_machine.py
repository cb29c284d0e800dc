"""Hosts as virtual machines: the same calls as for a namespace, and the same end of all of it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from krelay_vm import DEFAULT, Host, Lab, LabError, LabTimeout, Link, Topology, registry
from krelay_vm.build import remove_leftovers
from krelay_vm.machine import Machine
from tests.vm.test_lab import alive, enough_to_begin, traces, until

KERNELS = [
    pytest.param("uml", marks=pytest.mark.vm),
    pytest.param("qemu", marks=[pytest.mark.qemu, pytest.mark.slow]),
]
BUSYBOX = "/bin/busybox"


@pytest.fixture(scope="module", params=KERNELS)
def lab(request: pytest.FixtureRequest) -> Iterator[Lab]:
    """Client and server are machines, the relay between them is not."""
    with Lab(backends={"client": request.param, "server": request.param}) as lab:
        yield lab


def test_a_machine_has_a_kernel_of_its_own_and_the_topologys_network(lab: Lab) -> None:
    kernel, name = lab.run("client", "uname", "-rn").stdout.split()[::-1]

    assert kernel != os.uname().release
    assert name == "client"
    assert "10.0.0.1/24" in lab.run("client", "ip", "-br", "addr", "show", "eth0").stdout
    assert "default via 10.0.0.254 dev eth0" in lab.run("client", "ip", "route").stdout
    assert lab.run(
        "client", "cat", "/proc/sys/net/ipv6/conf/all/forwarding", check=False
    ).stdout in (
        "0\n",
        "",
    )


@pytest.mark.serial
def test_run_tells_status_output_and_time(lab: Lab) -> None:
    script = "cat; echo oops >&2; exit 3"
    result = lab.run("client", "sh", "-c", script, input="hello", check=False)

    assert (result.status, result.stdout, result.stderr) == (3, "hello", "oops\n")
    assert 0 < result.seconds < 10
    assert lab.run("client", "sh", "-c", "kill -9 $$", check=False).status == -9
    assert lab.run("client", "printenv", "COLOUR", env={"COLOUR": "red"}).stdout == "red\n"
    assert lab.run("client", "pwd").stdout == f"{Path.cwd()}\n"
    with pytest.raises(LabError, match="no-such-command ended with status 127"):
        lab.run("client", "no-such-command")
    with pytest.raises(LabError, match="no command given"):
        lab.run("client")


def test_arguments_and_bytes_arrive_as_they_are(lab: Lab) -> None:
    odd = ["it's", "two\nlines", "a  b", "$HOME", "", "*", "\\", "zwölf"]
    assert lab.run("client", "printf", "%s|", *odd).stdout == "".join(f"{word}|" for word in odd)

    every = bytes(range(256)) * 300
    copy = lab.directory / "copy"
    lab.run("client", "sh", "-c", f"cat > {copy}", input=every)
    assert copy.read_bytes() == every
    back = lab.run("client", "md5sum", str(copy)).stdout
    assert back == subprocess.run(["md5sum", copy], capture_output=True, text=True).stdout


@pytest.mark.serial
def test_a_command_that_takes_too_long_is_killed_with_its_children(lab: Lab) -> None:
    limit = enough_to_begin(lab)
    began = time.monotonic()
    script = "sleep 61 & echo started; sleep 61"
    with pytest.raises(LabTimeout, match=f"took longer than {limit:g} s") as late:
        lab.run("client", "sh", "-c", script, timeout=limit)

    assert time.monotonic() - began < limit + 8
    assert "started" in str(late.value)
    until(lambda: "sleep 61" not in lab.run("client", BUSYBOX, "ps", "-o", "stat,args").stdout)


def test_a_program_is_read_while_it_runs_and_ends_by_signal(lab: Lab) -> None:
    script = "echo $$; trap 'echo interrupted; exit 5' INT; while :; do sleep 0.1; done"
    program = lab.start("server", "sh", "-c", script)
    lab.wait(lambda: program.output, "its output")

    assert program.output.split() == [str(program.pid)]
    assert program.poll() is None
    program.signal(signal.SIGINT)
    assert program.wait() == 5
    assert program.output.split()[1:] == ["interrupted"]
    program.kill()  # harmless
    deaf = lab.start("server", "sleep", "60")
    with pytest.raises(LabTimeout):
        deaf.wait(0.05)
    deaf.terminate()
    assert deaf.wait() == -signal.SIGTERM


def test_a_request_survives_the_end_of_a_command_in_its_middle(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    ending = lab.start("client", "sleep", "0.3")

    def in_parts(machine: Machine, line: str) -> None:
        with open(machine.folder / "console.in", "wb", buffering=0) as console:
            console.write(line[:6].encode())
            ending.wait()
            threading.Event().wait(0.3)  # who wrote its status ends a moment later
            console.write(line[6:].encode() + b"\n")

    with monkeypatch.context() as patched:
        patched.setattr(Machine, "request", in_parts)
        assert lab.run("client", "echo", "whole", timeout=5.0).stdout == "whole\n"


def test_several_threads_run_commands_at_once(lab: Lab) -> None:
    answers: dict[int, str] = {}

    def ask(number: int) -> None:
        answers[number] = lab.run("client", "sh", "-c", f"sleep 0.2; echo {number}").stdout

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert answers == {number: f"{number}\n" for number in range(5)}


def test_machines_talk_through_the_relay_and_a_capture_sees_it(lab: Lab) -> None:
    (lab.directory / "page").write_text("hello from the server\n")
    server = lab.start("server", BUSYBOX, "httpd", "-f", "-p", "80", "-h", str(lab.directory))
    lab.wait_listening("server", "tcp", 80)
    with lab.capture("server", "eth0") as packets:
        packets.settimeout(5)
        url = "http://192.168.0.1/page"
        assert lab.run("client", BUSYBOX, "wget", "-q", "-O", "-", url).stdout == (
            "hello from the server\n"
        )
        frames = iter(lambda: packets.recvfrom(65536), None)
        where = next(where for frame, where in frames if b"hello from" in frame)

    assert where[2] == socket.PACKET_OUTGOING
    server.terminate()
    assert server.wait() == -signal.SIGTERM


def test_a_machine_cannot_be_entered_or_write_outside_the_labs_directory(lab: Lab) -> None:
    mistaken = pytest.raises(LabError, match="client can't be entered: it is a virtual machine")
    with mistaken, lab.enter("client"):
        pass
    with pytest.raises(LabError, match="can't write /root/log: not in"):
        lab.start("client", "true", log=Path("/root/log"))
    assert lab.run("client", "touch", "/usr/there", check=False).status != 0


def test_a_link_is_cut_and_joined_again(lab: Lab) -> None:
    ping = (BUSYBOX, "ping", "-c1", "-W1", "192.168.0.1")
    assert lab.run("client", *ping).status == 0
    for host, interface in (("server", "eth0"), ("relay", "eth1")):
        lab.link_down(host, interface)
        assert lab.run("client", *ping, check=False).status == 1
        lab.link_up(host, interface)
        lab.wait(lambda: lab.run("client", *ping, check=False).status == 0, "a ping")
    with pytest.raises(LabError, match="server eth7: no interface"):
        lab.link_down("server", "eth7")


def test_a_machine_is_killed_and_boots_again(lab: Lab) -> None:
    program = lab.start("server", "sleep", "60")
    waiting: list[LabError] = []

    def wait_long() -> None:
        with pytest.raises(LabError) as ended:
            lab.run("server", "sleep", "60", timeout=60)
        waiting.append(ended.value)

    thread = threading.Thread(target=wait_long)
    thread.start()
    lab.wait(lambda: "sleep" in lab.run("server", BUSYBOX, "ps").stdout, "the command")
    lab.kill("server")
    thread.join(10)

    assert "the machine server has ended" in str(waiting[0])
    assert program.poll() == -signal.SIGKILL
    with pytest.raises(LabError, match="the machine server does not run"):
        lab.run("server", "true")
    with pytest.raises(LabError, match="relay is a namespace"):
        lab.kill("relay")

    lab.boot("server")
    assert lab.run("client", BUSYBOX, "ping", "-c1", "-W2", "192.168.0.1").status == 0
    with pytest.raises(LabError, match="server runs already"):
        lab.boot("server")


@pytest.mark.serial
def test_a_panic_is_told_at_once_with_the_consoles_last_lines(lab: Lab) -> None:
    began = time.monotonic()
    with pytest.raises(LabError, match="the machine client has ended") as ended:
        lab.run("client", "sh", "-c", "echo c > /proc/sysrq-trigger; sleep 60", timeout=60)

    assert "panic" in str(ended.value)
    assert time.monotonic() - began < 30
    lab.boot("client")


TWO_NETS = Topology(
    hosts=(
        Host("left", gateway="10.1.0.2"),
        Host("middle", forwards=True),
        Host("right", gateway="10.2.0.2 fd00::2"),
    ),
    links=(
        Link("left 10.1.0.1/24", "middle 10.1.0.2/24", mtu=1400),
        Link("middle 10.2.0.2/24 fd00::2/64", "right 10.2.0.1/24 fd00::1/64"),
    ),
)


@pytest.mark.parametrize("backend", KERNELS)
def test_a_machine_with_two_links_forwards(backend: str) -> None:
    with Lab(TWO_NETS, backends={"middle": backend}) as lab:
        said = "import socket; print(socket.create_server(('', 7)).accept()[0].recv(9))"
        server = lab.start("right", "python3", "-c", said)
        lab.wait_listening("right", "tcp", 7)
        with lab.enter("left"), socket.create_connection(("10.2.0.1", 7), 10) as connection:
            connection.sendall(b"through")

        assert server.wait() == 0
        assert server.output == "b'through'\n"
        assert "mtu 1400" in lab.run("middle", "ip", "link", "show", "eth0").stdout
        assert "inet6 fd00::2/64" in lab.run("middle", "ip", "addr", "show", "eth1").stdout
        lab.run("right", "python3", "-c", PING6)


PING6 = """
import socket
s = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
s.settimeout(5)
s.connect(("fd00::2", 9))
s.send(b"?")
try:
    s.recv(1)
except ConnectionRefusedError:
    pass  # an answer of the machine's
"""


@pytest.mark.vm
def test_what_its_first_program_complains_of_is_in_the_error() -> None:
    wrong = Topology(
        hosts=(Host("a", sysctls={"net.ipv4.no_such_setting": 1}), Host("b")),
        links=(Link("a 10.1.0.1/24", "b 10.1.0.2/24"),),
    )
    lab = Lab(wrong, backends={"a": "uml"})
    with pytest.raises(LabError, match="the machine a has ended") as ended, lab:
        pass

    assert "no_such_setting: nonexistent directory" in str(ended.value)


OWNER = """
import sys
from krelay_vm import Lab
lab = Lab(backends="uml")
print("begun", flush=True)
with lab:
    print(lab.name, *(machine.identity.pid for machine in lab._machines.values()), flush=True)
    sys.stdin.read()
"""


def owner() -> "subprocess.Popen[str]":
    """A process that has a lab of machines, until its input ends."""
    return subprocess.Popen(
        [sys.executable, "-B", "-c", OWNER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


@pytest.mark.vm
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_machines_end_with_their_owner(number: signal.Signals) -> None:
    with owner() as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        name, *pids = process.stdout.readline().split()
        machines = [int(pid) for pid in pids]
        assert len(machines) == len(DEFAULT.names)
        assert all(map(alive, machines))
        process.send_signal(number)
        process.wait(10)
        until(lambda: not any(map(alive, machines)))

    if number == signal.SIGKILL:
        assert name in remove_leftovers()
    assert traces(name) == []


@pytest.mark.vm
def test_a_ctrl_c_during_the_boot_leaves_nothing() -> None:
    with owner() as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n"
        until(lambda: name_of(process.pid) != "")
        name = name_of(process.pid)
        until((Path(tempfile.gettempdir()) / name / "vm/client/pid").exists)
        process.send_signal(signal.SIGINT)
        process.wait(20)

    assert process.returncode == -signal.SIGINT
    assert traces(name) == []


def name_of(owner: int) -> str:
    """The name of the lab of that process."""
    names = [r.name for r in registry.records() if r.owner and r.owner.pid == owner]
    return names[0] if names else ""
