"""Somebody else takes krelay's rules out while it relays: they are put back, and it is said."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from knet.wire.tcp import SYN
from krelay.daemon import rulekeeper
from krelay.rules.spec import instance_name
from procfs_sim.tree import DEFAULT_ROOT
from tests.net.conftest import SharedWorlds, prepared_world
from tests.net.routed import watching
from tests.net.world import PYTHON, World, answers, echo, greet

pytestmark = pytest.mark.net

NFT = {
    "nft flush ruleset": "nft flush ruleset",
    "the table": "nft delete table ip {table}",
    "one chain": "nft flush chain ip {table} pre",
    "the chain of the queue": "nft flush chain ip {table} to-worker",
}
IPTABLES = {
    "nft flush ruleset": "nft flush ruleset",
    "iptables -F": "for t in filter nat mangle raw; do iptables -t $t -F; done",
    "one chain": "iptables -t raw -F PREROUTING",
    "iptables-restore": "printf '*raw\\nCOMMIT\\n*mangle\\nCOMMIT\\n' | iptables-restore",
}
DEAF = """
table ip deaf {
    chain input {
        type filter hook input priority filter
        tcp flags & (syn | ack) == syn | ack drop
    }
}
"""
"""Nobody who has these rules gets an answer when they open a connection."""
OURS = "krelay's rules were taken out; they are put back"


@pytest.fixture(scope="module")
def shared_worlds(datapath: str) -> Iterator[SharedWorlds]:
    with SharedWorlds(
        lambda: prepared_world(datapath, lambda world: world.put(services="tcp/80 tcp/443=forward"))
    ) as worlds:
        yield worlds


def begin_with(world: World, services: str, **programs: str) -> Path:
    """Relaying by a krelay that finds these programs alone, each by a name of its own; where."""
    tools = world.lab.directory / "tools"
    tools.mkdir()
    for name, program in programs.items():
        (tools / name).symlink_to(f"/usr/sbin/{program}")
    command = (*PYTHON, "-m", "krelay", "daemon", "--root", str(world.root))
    world.krelay_process = world.lab.start("relay", "env", f"PATH={tools}", *command)
    world.until(lambda: answers(world.root), "an answer")
    world.put(gport=18000, services=services, real_ip=world.server, datapath=world.datapath)
    world.start_tcp_relay()
    world.put(start=1)
    world.until_state("running")
    return tools


def iptables(flavour: str = "") -> dict[str, str]:
    """iptables' programs by the names that krelay looks for."""
    return {f"iptables{of}": f"iptables{flavour}{of}" for of in ("", "-save", "-restore")}


@pytest.mark.parametrize("flushes", [NFT, IPTABLES], ids=["nft", "iptables"])
def test_rules_that_are_flushed_come_back_and_a_connection_at_rest_goes_on(
    world: World, flushes: dict[str, str]
) -> None:
    world.serve("server", "tcp/80", "udp/7")
    if flushes is IPTABLES:
        begin_with(world, "tcp/80 udp/7", **iptables())
    else:
        world.begin()
    idle = world.connect("client", 80)
    greet(idle)
    before = world.rules()
    table = instance_name(str(world.root), DEFAULT_ROOT)
    assert (f"table ip {table} " in before) is (flushes is NFT)
    for number, (name, command) in enumerate(flushes.items()):
        world.lab.run("relay", "sh", "-c", command.format(table=table))
        world.until(lambda: world.rules() == before, f"rules after {name}", timeout=5)
        assert world.who("client", 80).startswith(f"{world.client}:"), name
        assert world.who_udp("client", 7).startswith(f"{world.client}:"), name
        assert world.read("status/state") == "running"
        assert world.krelay_process.output.count(OURS) == 1, number  # one in ten seconds

    echo(idle, b"still there")
    world.krelay("stop")
    assert "krelay" not in world.rules()


@pytest.mark.parametrize("source", ["client", "relay"])
@pytest.mark.parametrize("port", [80, 443], ids=["terminated", "forwarded"])
def test_who_was_cut_off_while_rules_were_gone_is_told_and_does_not_wait(
    shared: World, port: int, source: str
) -> None:
    """What went on as it was is answered by a RST, mostly to one end: the other stood still."""
    world = shared
    world.put(source=source)
    idle = world.connect("client2", port)
    greet(idle)
    before = world.rules()
    for number in range(3):
        download = world.download("client", port, number, 1 << 30)
        world.until(lambda d=download: d.received > 1 << 20, "some of it")  # type: ignore[misc]
        world.lab.run("relay", "nft", "flush", "ruleset")
        enough = download.received + (16 << 20)  # more than is on the way
        world.until(
            lambda d=download, e=enough: d.ended or d.received > e,  # type: ignore[misc]
            "its end, or that it goes on",
            timeout=5,  # less than it waits itself
        )
        download.socket.close()
        world.until(lambda: world.rules() == before, "rules", timeout=5)
        assert world.who("client", port)
    echo(idle, b"still there")


@pytest.mark.parametrize("port", [80, 443], ids=["terminated", "forwarded"])
def test_who_connects_when_rules_are_back_is_not_asked_what_others_are(
    shared: World, port: int
) -> None:
    """The ends of older connections are sent a SYN, twice; who opens one must not hear that."""
    world = shared
    old = world.connect("client2", port)
    greet(old)
    before = world.rules()
    with watching(world, "client2", lambda packet: packet[33] == SYN) as queries:
        world.lab.run("relay", "nft", "flush", "ruleset")
        world.until(lambda: world.rules() == before, "rules", timeout=5)
        queries.next()
        world.nft("client", DEAF)
        new = world.open("client")
        new.setblocking(False)
        with suppress(BlockingIOError):
            new.connect((world.relay, port))
        queries.next()
    world.lab.run("client", "nft", "delete", "table", "ip", "deaf")
    new.settimeout(10)

    assert greet(new).startswith(f"{world.client}:")
    echo(old, b"still there")


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
    """nft is gone from the PATH of this krelay by then."""
    world.serve("server", "tcp/80")
    tools = begin_with(world, "tcp/80", nft="nft")
    for tool in tools.iterdir():
        tool.unlink()
    world.lab.run("relay", "nft", "flush", "ruleset")

    world.until(lambda: world.read("status/state").startswith("failed: "), "failed")
    assert "krelay's rules were taken out" in world.read("status/state")
    with pytest.raises(ConnectionRefusedError):
        world.connect("client", 80)


def test_the_older_interface_is_looked_at_every_few_seconds(world: World) -> None:
    world.serve("server", "tcp/80", "udp/7")
    begin_with(world, "tcp/80 udp/7", **iptables("-legacy"))
    world.lab.run("relay", "iptables-legacy", "-t", "raw", "-F")
    world.lab.run("relay", "iptables-legacy", "-t", "mangle", "-F")

    within = 2 * rulekeeper.LOOK_EVERY
    world.until(lambda: OURS in world.krelay_process.output, "rules put back", timeout=within)
    assert world.who("client", 80).startswith(f"{world.client}:")
    assert world.who_udp("client", 7).startswith(f"{world.client}:")
