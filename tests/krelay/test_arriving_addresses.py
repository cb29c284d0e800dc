"""The worker and addresses of this host that it hasn't been told of: the kernel is asked at once.

K is known, V has just arrived, U nobody can tell of.  Q, C and D are others'.
"""

import pytest

from knet.endpoint import Source
from krelay.steps import Hook
from tests.tools.packets import addr, policy, template
from tests.tools.script import Host, describe

V, U = "192.168.0.50", "192.168.0.51"


class Asked(Host):
    """A host that counts what the kernel is asked."""

    def __init__(self, **changes: object) -> None:
        super().__init__(policy(**changes))
        self.queries: list[bytes] = []
        self.worker.asks_host = self.relays.asks_host = self._asked

    def _asked(self, address: bytes, now: float) -> bool | None:
        self.queries.append(address)
        return {addr(V): True, addr(U): None}.get(address, False)

    def does(self, hook: str, text: str) -> str:
        return self.run(0.0, hook, text)


@pytest.fixture
def host() -> Asked:
    return Asked(udp=frozenset({53, 7}), tcp=frozenset({80, 443}), forwarded=frozenset({443}))


def test_clients_of_an_arriving_address_are_relayed(host: Asked) -> None:
    assert host.does("pre", f"C:40000 > {V}:80 [S]") == f"C:40000 > {V}:16000"
    assert host.does("post", f"{V}:16000 > C:40000 [S.]") == f"{V}:80 > C:40000"
    assert host.does("pre", f"C:40001 > {V}:443 [S]") == "C:40001 > S:443"
    assert host.does("pre", f"C:4000 > {V}:7") == "C:4000 > S:7"
    assert host.does("post", "S:7 > C:4000") == f"{V}:7 > C:4000"


def test_where_the_kernel_does_not_tell_nobody_is_refused(host: Asked) -> None:
    for text in (f"C:1 > {U}:80 [S]", f"C:1 > {U}:7", f"C:1 > {U}:16000 [S]"):
        assert host.does("pre", text) == "drop address_unknown"
    assert host.does("post", f"{U}:16000 > C:1 [S.]") == "drop address_unknown"
    assert len(host.nat) == 0


def test_nobody_reaches_tcp_relay_at_an_arriving_address(host: Asked) -> None:
    answer = host.does("pre", f"C:40000 > {V}:16000 [S]")
    assert answer == f"drop gateway_port + {V}:16000 > C:40000 [R.]"
    assert host.does("post", f"{V}:16000 > C:40001 [S.]") == "drop no_flow"


def test_own_flows_of_an_arriving_address_are_known(host: Asked) -> None:
    assert host.does("post", f"{V}:7 > Q:7") == "pass own"
    assert host.does("pre", f"Q:7 > {V}:7") == "pass own"


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        ("pre", "C:4000 > K:7"),
        ("pre", "C:4000 > S:7"),
        ("pre", "S:80 > C:5000 [.]"),
        ("pre", f"C:4000 > {V}:9"),
        ("post", "S:7 > C:4000"),
        ("post", "S:53 > C:4000"),
        ("post", "K:7 > Q:7"),
        ("post", "K:5000 > S:80 [S]"),
    ],
)
def test_what_does_not_matter_is_not_asked(host: Asked, hook: str, text: str) -> None:
    host.does(hook, text)
    assert host.queries == []


def test_known_flows_ask_nothing(host: Asked) -> None:
    host.does("pre", f"C:4000 > {V}:7")
    asked = len(host.queries)
    for _ in range(5):
        host.does("pre", f"C:4000 > {V}:7")
        host.does("post", "S:7 > C:4000")
    assert len(host.queries) == asked == 1


@pytest.mark.parametrize("source", Source)
def test_tcp_relay_may_come_from_an_arriving_address(source: Source) -> None:
    host = Asked(source=source)
    assert host.does("pre", "C:40000 > K:80 [S]") == "C:40000 > K:16000"
    assert host.does("open", f"C:40000 @16000 from {U}:45678").startswith("refused: relay is no")
    assert host.does("open", f"C:40000 @16000 from {V}:45678") == f"S:80 {source}"


def test_a_connection_to_a_local_network_is_resumed() -> None:
    host = Asked()
    host.does("set", "recovering=5")
    asked = f"C:40000 @16000 from {V}:45678 to S:80"
    assert host.does("resume", asked) == "resumed"


def test_refusals_come_from_the_address_that_was_asked(host: Asked) -> None:
    host.does("set", "flows=1")
    host.does("pre", "D:1 > K:80 [S]")
    host.does("pre", "D:1 > K:80 [.]")
    host.does("open", "D:1 @16000 from K:45678")
    refused = host.does("pre", f"C:4000 > {V}:7")
    assert refused.startswith("drop ")
    assert f"+ {V} > C icmp 3/13" in refused


def test_errors_of_this_host_from_an_arriving_address_are_its_own(host: Asked) -> None:
    """Nobody on the link has the server's address: tcp-relay's packet quoted, as it left."""
    host.does("pre", "C:40000 > K:80 [S]")
    host.does("open", "C:40000 @16000 from K:45678")
    quoted = template("C:45678 > S:80 [S]").build()
    host.worker.handle(error_from(V, "C", quoted), Hook.POSTROUTING, 0.0)
    (answer,) = host.worker.answers
    assert describe(answer) == f"{V} > K icmp 3/1"
    assert answer[28:][12:20] == addr("K") + addr("S")


def test_what_is_between_the_hooks_of_a_flow_that_ends_goes_nowhere() -> None:
    """It would leave with the client's address, though the server is to see the relay's."""
    host = Asked(source=Source.RELAY, udp=frozenset({7}))
    assert host.does("pre", "C:4000 > K:7") == "C:4000 > S:7"
    for flow in host.nat.unanswered():
        host.nat.end(flow)
    assert host.does("post", "C:4000 > S:7") == "drop no_flow"
    assert host.does("pre", "C:4001 > S:7") == "pass direct"
    assert host.does("post", "C:4001 > S:7") == "pass no_flow"


def error_from(src: str, dst: str, quoted: bytes) -> bytes:
    """Host unreachable."""
    from scapy.layers.inet import ICMP, IP
    from scapy.packet import Raw

    names = [".".join(map(str, addr(each))) for each in (src, dst)]
    packet = IP(src=names[0], dst=names[1]) / ICMP(type=3, code=1) / Raw(quoted[:28])
    return bytes(packet)
