"""What a machine is told."""

import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from krelay_vm import DEFAULT, Host, Link, Topology, guest
from krelay_vm.guest import Streams

ODD = Topology(
    hosts=(Host("a", sysctls={"net.ipv4.conf.default.rp_filter": 2}), Host("b", gateway="fd00::1")),
    links=(
        Link("a 10.1.0.1/24", "b 10.1.0.2/24", mtu=1400),
        Link("a fd00::1/64", "b fd00::2/64"),
    ),
)


def init(topology: Topology, host: str, backend: str = "uml") -> list[str]:
    return guest.init(topology, host, backend, "/tmp/lab", "/tmp/lab/vm/x").splitlines()


@pytest.mark.parametrize("backend", ["uml", "qemu"])
@pytest.mark.parametrize("host", DEFAULT.names)
def test_the_first_program_is_a_shell_script(backend: str, host: str) -> None:
    text = guest.init(DEFAULT, host, backend, "/tmp/lab", "/tmp/lab/vm/x", ["/a b.ko"])

    subprocess.run(["sh", "-n"], input=text, text=True, check=True)
    assert "$b insmod '/a b.ko'" in text.splitlines()


def test_addresses_routes_and_forwarding_come_from_the_topology() -> None:
    client, relay = init(DEFAULT, "client"), init(DEFAULT, "relay")

    assert "$b ip addr add 10.0.0.1/24 dev eth0" in client
    assert "$b ip route add 0.0.0.0/0 via 10.0.0.254" in client
    assert "$b hostname client" in client
    assert not [line for line in client if "ip_forward" in line]
    assert "echo 1 >/proc/sys/net/ipv4/ip_forward" in relay
    assert [line for line in relay if "addr add" in line] == [
        "$b ip addr add 10.0.0.254/24 dev eth0",
        "$b ip addr add 192.168.0.2/24 dev eth1",
    ]


def test_settings_for_interfaces_to_come_are_for_those_there_as_well() -> None:
    lines = init(ODD, "a")

    for name in ("default", "eth0", "eth1"):
        assert f"echo 2 >/proc/sys/net/ipv4/conf/{name}/rp_filter" in lines
    assert "$b ip link set eth0 mtu 1400" in lines
    assert "$b ip -6 route add ::/0 via fd00::1" in init(ODD, "b")


def test_interfaces_are_called_the_same_everywhere() -> None:
    renamed = "$b ip link set vec1 name eth1"

    assert renamed in init(DEFAULT, "relay", "uml")
    assert renamed not in init(DEFAULT, "relay", "qemu")


def test_a_user_mode_linux_has_an_interface_for_each_end_of_a_wire() -> None:
    command = guest.uml_command("linux.uml", ODD, "b", "/tmp/lab/vm/b", 7)

    assert command[0] == "linux.uml"
    assert "init=/tmp/lab/vm/b/init" in command
    assert "con1=fd:7" in command
    assert command[-2:] == (
        "vec0:transport=tap,ifname=tap0,depth=64,gro=1,mac=02:76:6d:00:01:00,mtu=1400",
        "vec1:transport=tap,ifname=tap1,depth=64,gro=1,mac=02:76:6d:00:01:01",
    )


def test_an_emulated_pc_never_uses_kvm_and_gets_both_file_systems() -> None:
    command = guest.qemu_command(
        "vmlinux", "initramfs", DEFAULT, "relay", "/tmp/lab", "/tmp/lab/vm/r"
    )
    options = [" ".join(pair) for pair in pairwise(command)]

    assert "-accel tcg,tb-size=64" in options
    assert not [word for word in command if "kvm" in word]
    assert any(
        o.startswith("-virtfs") and "path=/,mount_tag=root,readonly=on" in o for o in options
    )
    assert any(o.startswith("-virtfs") and "path=/tmp/lab,mount_tag=share" in o for o in options)
    assert len([word for word in command if word.startswith("virtio-net-pci")]) == 2
    assert any("SHARE=/tmp/lab FIRST=/tmp/lab/vm/r/init" in word for word in command)


def test_hardware_addresses_are_local_and_differ() -> None:
    ends = [end for host in DEFAULT.names for end in DEFAULT.interfaces(host)]
    macs = {guest.mac(DEFAULT, end) for end in ends}

    assert len(macs) == len(ends) == 4
    assert all(int(mac[:2], 16) & 3 == 2 for mac in macs)


def test_a_job_becomes_its_command_with_its_arguments_as_they_are(tmp_path: Path) -> None:
    out, err = tmp_path / "o ut", tmp_path / "err"
    (tmp_path / "in").write_bytes(b"from in\n")
    argv = [
        "sh",
        "-c",
        'cat; printf "%s|" "$@" "$COLOUR" "$PWD"; echo oops >&2',
        "sh",
        "it's",
        "a\nb",
        "",
    ]
    streams = Streams(str(tmp_path / "in"), str(out), str(err))
    env = {"COLOUR": "dark red", "PATH": "/usr/bin:/bin"}
    subprocess.run(
        ["sh", "-s"], input=guest.job(argv, streams, str(tmp_path), env), text=True, check=True
    )

    assert out.read_text() == f"from in\nit's|a\nb||dark red|{tmp_path}|"
    assert err.read_text() == "oops\n"


def test_a_job_in_a_folder_that_is_not_there_runs_at_the_root(tmp_path: Path) -> None:
    streams = Streams("/dev/null", str(tmp_path / "out"), str(tmp_path / "err"))
    text = guest.job(["pwd"], streams, "/no/such/folder", {"PATH": "/usr/bin:/bin"})
    subprocess.run(["sh", "-s"], input=text, text=True, check=True)

    assert (tmp_path / "out").read_text() == "/\n"
