"""The ways that UDP takes from client to server, each prepared in a lab of its own.

No relay, the kernel's own, krelay, and the worker that most people write first.  The flows of
krelay and of the kernel's connection tracking live equally long.
"""

from collections.abc import Mapping

from benchmarks import ground, scapy_worker
from krelay_vm import Lab

FORWARD, DNAT, SCAPY = "plain forwarding", "conntrack DNAT", "scapy"
"""Of krelay see ground.DATAPATHS."""
WAYS = (FORWARD, DNAT, *ground.DATAPATHS, SCAPY)
DNS = 53
_NO_SETTINGS: Mapping[str, str] = {}
_TRACKED = ("nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream")


def prepare(
    lab: Lab,
    way: str,
    port: int,
    *,
    core: int = -1,
    timeout: int = 300,
    settings: Mapping[str, str] = _NO_SETTINGS,
) -> str:
    """Sets the way up for this UDP port of the server; the address that the client sends to.

    `core` is where a worker stays, krelay's or scapy's, and `timeout` the seconds that idle flows
    live; `settings` are more of krelay's.
    """
    if way == FORWARD:
        return lab.address("server")
    if way == DNAT:
        ground.dnat(lab, "udp", [port])
        lifetimes = [f"net.netfilter.{name}={timeout}" for name in _TRACKED]
        lab.run("relay", "sysctl", "--quiet", "--write", *lifetimes)
    elif way == SCAPY:
        _scapy(lab, port, core)
    else:
        name = "timeouts/udp_dns" if port == DNS else "timeouts/udp"
        base = {"services": f"udp/{port}", name: str(timeout)}
        ground.start_krelay(lab, {**base, **ground.DATAPATHS[way], **settings}, core)
    return lab.address("relay", "client")


def _scapy(lab: Lab, port: int, core: int) -> None:
    relay, server = lab.address("relay", "client"), lab.address("server")
    for chain, *match in (
        ("PREROUTING", "-d", relay, "-p", "udp", "--dport", str(port)),
        ("POSTROUTING", "-s", server, "-p", "udp", "--sport", str(port)),
    ):
        queue = ("-j", "NFQUEUE", "--queue-num", "0")
        lab.run("relay", "iptables", "-t", "mangle", "-A", chain, *match, *queue)
    command = (*ground.PYTHON, scapy_worker.__file__, "0", server, relay)
    worker = lab.start("relay", *ground.pinned(core), *command)
    lab.wait(lambda: "serving" in worker.output or worker.poll() is not None, "scapy's worker", 20)
