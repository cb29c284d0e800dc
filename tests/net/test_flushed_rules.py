"""Somebody else takes krelay's rules out while it relays: they are put back, and it is said."""

import pytest

from krelay import relaying
from tests.net.world import PYTHON, World, answers, echo, greet

pytestmark = pytest.mark.net

FLUSHES = {
    "nft flush ruleset": ("nft", "flush", "ruleset"),
    "iptables -F": ("sh", "-c", "for t in filter nat mangle raw; do iptables -t $t -F; done"),
    "one chain": ("iptables", "-t", "raw", "-F", "PREROUTING"),
    "iptables-restore": (
        "sh",
        "-c",
        "printf '*raw\\nCOMMIT\\n*mangle\\nCOMMIT\\n' | iptables-restore",
    ),
}
OURS = "somebody took krelay's rules out; they are put back"


def with_path(world: World, path: str) -> None:
    """`krelay daemon` that finds its tools there alone."""
    command = (*PYTHON, "-m", "krelay", "daemon", "--root", str(world.root))
    world.krelay_process = world.lab.start("relay", "env", f"PATH={path}", *command)
    world.until(lambda: answers(world.root), "an answer")


def test_rules_that_are_flushed_come_back_and_a_connection_at_rest_goes_on(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    world.begin()
    idle = world.connect("client", 80)
    greet(idle)
    before = world.rules()
    for number, (name, command) in enumerate(FLUSHES.items()):
        world.lab.run("relay", *command)
        world.until(lambda: world.rules() == before, f"rules after {name}", timeout=5)
        assert world.who("client", 80).startswith(f"{world.client}:"), name
        assert world.who_udp("client", 7).startswith(f"{world.client}:"), name
        assert world.read("status/state") == "running"
        assert world.krelay_process.output.count(OURS) == 1, number  # one in ten seconds

    echo(idle, b"still there")
    world.krelay("stop")
    assert "krelay" not in world.rules()


def test_rules_of_others_that_go_are_none_of_our_business(world: World) -> None:
    world.serve("server", "tcp/80")
    world.begin()
    world.nft("relay", "table ip other {\n chain c {\n accept\n }\n}\n")
    world.lab.run("relay", "nft", "delete", "table", "ip", "other")
    for gport in (18001, 18002):  # our own changes are none either
        world.put(gport=gport)
    assert world.who("client", 80).startswith(f"{world.client}:")

    assert OURS not in world.krelay_process.output


def test_rules_that_cannot_be_put_back_end_relaying_with_the_reason(world: World) -> None:
    """iptables is gone from the PATH of this krelay by then."""
    world.serve("server", "tcp/80")
    tools = world.lab.directory / "tools"
    tools.mkdir()
    for name in ("iptables", "iptables-save", "iptables-restore", "nft", "unshare"):
        (tools / name).symlink_to(f"/usr/sbin/{name}" if name != "unshare" else "/usr/bin/unshare")
    with_path(world, str(tools))
    world.put(gport=18000, services="tcp/80", real_ip=world.server)
    world.start_tcp_relay()
    world.put(start=1)
    world.until_state("running")
    for tool in tools.iterdir():
        tool.unlink()
    world.lab.run("relay", "nft", "flush", "ruleset")

    world.until(lambda: world.read("status/state").startswith("failed: "), "failed")
    assert "somebody took krelay's rules out" in world.read("status/state")
    with pytest.raises(ConnectionRefusedError):
        world.connect("client", 80)


def test_the_older_interface_is_looked_at_every_few_seconds(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    tools = world.lab.directory / "tools"
    tools.mkdir()
    for name in ("iptables", "iptables-save", "iptables-restore"):
        (tools / name).symlink_to(f"/usr/sbin/{name.replace('iptables', 'iptables-legacy')}")
    (tools / "unshare").symlink_to("/usr/bin/unshare")
    with_path(world, str(tools))
    world.put(gport=18000, services="tcp/80 udp/7", real_ip=world.server)
    world.start_tcp_relay()
    world.put(start=1)
    world.until_state("running")
    world.lab.run("relay", "iptables-legacy", "-t", "raw", "-F")
    world.lab.run("relay", "iptables-legacy", "-t", "mangle", "-F")

    within = 2 * relaying.LOOK_EVERY
    world.until(lambda: OURS in world.krelay_process.output, "rules put back", timeout=within)
    assert world.who("client", 80).startswith(f"{world.client}:")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")
