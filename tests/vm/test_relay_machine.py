"""krelay and tcp-relay inside a virtual machine, each with the rules its kernel can do."""

import sys
from pathlib import Path

import pytest

from vm import Lab

ROOT = "/run/krelay"
PYTHON = (sys.executable, "-B")
HERE = {"PYTHONPATH": str(Path(__file__).parents[2])}
PATIENCE = 60.0  # seconds: Python starts slowly under emulation


@pytest.mark.parametrize(
    ("backend", "rules"),
    [
        pytest.param("uml", "iptables-legacy", marks=[pytest.mark.vm, pytest.mark.slow]),
        pytest.param("qemu", "nft", marks=[pytest.mark.qemu, pytest.mark.slow]),
    ],
)
def test_a_machine_relays_with_rules_of_its_own_kernel(backend: str, rules: str) -> None:
    with Lab(backends={"relay": backend}) as lab:

        def shell(text: str) -> str:
            return lab.run("relay", "sh", "-c", text, check=False, timeout=PATIENCE).stdout

        krelay = lab.start("relay", *PYTHON, "-m", "krelay", "daemon", "--root", ROOT, env=HERE)
        lab.wait(lambda: "stopped" in shell(f"cat {ROOT}/status/state"), "krelay", PATIENCE)
        for name, value in (
            ("real_ip", "192.168.0.1"), ("services", "tcp/80 udp/53"), ("gport", "16000"),
        ):  # fmt: skip
            shell(f"echo '{value}' > {ROOT}/{name}")
        relay = lab.start("relay", *PYTHON, "-m", "tcp_relay", "--root", ROOT, env=HERE)
        lab.wait(lambda: "listening gport=16000" in relay.output, "tcp-relay", PATIENCE)
        shell(f"echo 1 > {ROOT}/start")
        lab.wait(lambda: "running" in shell(f"cat {ROOT}/status/state"), "relaying", PATIENCE)
        assert f"rules={rules} " in krelay.output

        (lab.directory / "page").write_text("hello from the server\n")
        server = lab.start("server", "/bin/busybox", "httpd", "-f", "-vv", "-h", str(lab.directory))
        lab.start(
            "server", "dnsmasq", "-k", "-C", "/dev/null", "--no-resolv", "--no-hosts", "-u", "root",
            "--address=/www.example.test/192.0.2.7", f"--pid-file={lab.directory}/dnsmasq.pid",
        )  # fmt: skip
        lab.wait_listening("server", "tcp", 80)
        lab.wait_listening("server", "udp", 53)
        web = ("curl", "-sS", "-m10", "http://192.168.0.2/page")
        dns = ("dig", "+short", "+time=5", "@192.168.0.2", "www.example.test")
        assert lab.run("client", *web, timeout=20).stdout == "hello from the server\n"
        assert lab.run("client", *dns, timeout=20).stdout == "192.0.2.7\n"
        assert "10.0.0.1" in server.output  # whom it sees is the client

        shell(f"echo 0 > {ROOT}/start")
        lab.wait(lambda: "stopped" in shell(f"cat {ROOT}/status/state"), "the end", PATIENCE)
        assert "krelay" not in shell("iptables-legacy-save; nft list ruleset")
