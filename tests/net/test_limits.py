"""Limits as clients meet them: who is refused hears it, or doesn't, and nobody else notices."""

import socket
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from tests.net.world import PATIENCE, World, echo, greet

pytestmark = pytest.mark.net

ECHO = 7


@pytest.fixture
def live(shared: World) -> Iterator[World]:
    """Relaying, with a connection and a conversation over UDP that nothing may disturb."""
    with shared.connect("client", 80) as tcp, shared.open("client", socket.SOCK_DGRAM) as udp:
        assert greet(tcp).startswith(f"{shared.client}:")
        for text in (b"before", b"and again"):  # so that it is confirmed
            shared.exchange(udp, text, (shared.relay, ECHO))
        yield shared
        echo(tcp, b"undisturbed")
        shared.exchange(udp, b"undisturbed", (shared.relay, ECHO))
    assert shared.values("counters")["errors"] == 0


def attempts(world: World, host: str = "client", within: float = PATIENCE) -> dict[str, str]:
    """What comes of a new connection, and of a new datagram."""
    found = {}
    with world.open(host) as tcp:
        tcp.settimeout(within)
        try:
            tcp.connect((world.relay, 80))
            found["tcp"] = "ok"
        except OSError as error:
            found["tcp"] = type(error).__name__
    with world.open(host, socket.SOCK_DGRAM) as udp:
        udp.settimeout(within)
        udp.connect((world.relay, ECHO))
        udp.send(b"hello")
        try:
            udp.recv(10)
            found["udp"] = "ok"
        except OSError as error:
            found["udp"] = str(error)
    return found


def outcome(sock: socket.socket) -> str:
    """What comes of the datagram that it has sent."""
    try:
        return "answered" if sock.recv(10) == b"hello" else "something else"
    except OSError as error:
        return str(error)


def since(before: dict[str, Any], world: World, reason: str) -> tuple[int, dict[str, int]]:
    """What was dropped for this reason, and the client was refused, since these counters."""
    after, name = world.values("counters"), f"refused_{world.client}"
    refused = Counter(after.get(name, {})) - Counter(before.get(name, {}))
    return after[f"dropped_{reason}"] - before.get(f"dropped_{reason}", 0), dict(refused)


OK = {"tcp": "ok", "udp": "ok"}
RESET = {"tcp": "ConnectionRefusedError", "udp": "[Errno 113] No route to host"}
"""What RST and ICMP 3/13 are in Linux."""
SILENCE = {"tcp": "TimeoutError", "udp": "timed out"}


@pytest.mark.parametrize(("refusal", "heard"), [("reset", RESET), ("drop", SILENCE)])
@pytest.mark.parametrize(
    ("limit", "reason"), [("flows", "table_full"), ("flows_per_client", "client_full")]
)
def test_beyond_a_limit_new_flows_are_refused_as_it_is_set(
    live: World, limit: str, reason: str, refusal: str, heard: dict[str, str]
) -> None:
    before = live.values("counters")
    flows = 1 if limit == "flows_per_client" else len(live.flows())  # one for each of its budgets
    setting = f"limits__{limit}"
    live.put(None, limits__refusal=refusal, **{setting: flows})

    within = 0.7 if heard == SILENCE else PATIENCE
    assert attempts(live, within=within) == heard
    others = attempts(live, "client2", within if limit == "flows" else PATIENCE)
    assert others == (heard if limit == "flows" else OK)
    dropped, refused = since(before, live, reason)
    assert dropped >= 2
    assert refused == {reason: dropped} or limit == "flows"
    (listed,) = [
        line for line in live.ask("show counters") if line.startswith(f"refused_{live.client}=")
    ]
    assert f"{reason}:" in listed
    assert f"refused_{live.client}" in live.krelay("counters").stdout
    live.put(None, **{setting: flows + 100})
    assert attempts(live) == OK


def test_a_client_that_begins_too_many_flows_a_second_is_held_to_its_pace(live: World) -> None:
    before = live.values("counters")
    live.put(limits__new_flows_per_client=3)
    sockets = [live.open("client", socket.SOCK_DGRAM) for _ in range(40)]
    for sock in sockets:
        sock.connect((live.relay, ECHO))
        sock.send(b"hello")
    outcomes = Counter(outcome(sock) for sock in sockets)
    answered = outcomes.pop("answered")
    assert list(outcomes) == ["[Errno 113] No route to host"]

    assert 3 <= answered < 20
    dropped, refused = since(before, live, "client_rate")
    assert dropped == 40 - answered
    assert refused == {"client_rate": dropped}
    assert attempts(live, "client2") == OK
    live.put(limits__new_flows_per_client=0)
    assert attempts(live) == OK
    assert live.krelay("get", "limits/new_flows_per_client").stdout == "0\n"


def test_half_open_connections_of_a_full_table_make_room(live: World) -> None:
    """Who never answers (here: can't be answered) doesn't keep others out for four minutes."""
    before = live.values("counters")["evicted"]
    live.nft(
        "client2",
        "table ip deaf { chain in { type filter hook input priority 0; tcp sport 80 drop\n }\n}\n",
    )
    live.put(limits__flows=len(live.flows()) + 3)
    half_open = [live.open("client2") for _ in range(3)]
    for sock in half_open:
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            sock.connect((live.relay, 80))
    live.until(lambda: len(live.flows("state=opening")) == 3, "three rows")
    for sock in half_open:
        sock.close()

    def admitted() -> bool:
        with live.open("client") as sock:
            return sock.connect_ex((live.relay, 80)) == 0 and bool(greet(sock))

    assert admitted()
    assert live.values("counters")["evicted"] >= before + 1
