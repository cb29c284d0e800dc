"""Lines of a trace, and the filters that choose them."""

from random import Random

import pytest

from krelay.flow import Proto, Source
from krelay.nat import NatTable
from krelay.row import Hook, Row, Step
from krelay.trace import Filter, line
from tests.tools.packets import addr, at, policy, template
from tests.tools.script import RECORD_ROUTE, Host


@pytest.mark.parametrize(
    ("packet", "expected"),
    [
        (
            "C:40000 > K:80 [S]",
            "T1 10.0.0.1:40000 > 192.168.0.2:80 [S] => > 192.168.0.2:16000 flow 1",
        ),
        (
            "K:16000 > C:40000 [S.]",
            "T2 192.168.0.2:16000 > 10.0.0.1:40000 [S.] => 192.168.0.2:80 > flow 1",
        ),
        (
            "K:45678 > S:80 [P.]",
            "T3 192.168.0.2:45678 > 192.168.0.1:80 [P.] 10 bytes => 10.0.0.1:45678 > flow 1",
        ),
        (
            "S:80 > C:45678 [.]",
            "T4 192.168.0.1:80 > 10.0.0.1:45678 [.] => > 192.168.0.2:45678 flow 1",
        ),
        (
            "C:4000 > K:53",
            "U1,U2 10.0.0.1:4000 > 192.168.0.2:53 10 bytes => > 192.168.0.1:53 flow 2",
        ),
        (
            "S:53 > C:4000",
            "U3,U4 192.168.0.1:53 > 10.0.0.1:4000 10 bytes => 192.168.0.2:53 > flow 2",
        ),
        (
            "C:40001 > K:80 [S]",  # its row comes with it
            "T1 10.0.0.1:40001 > 192.168.0.2:80 [S] => > 192.168.0.2:16000 flow 3",
        ),
    ],
)
def test_a_line_shows_what_has_changed(packet: str, expected: str) -> None:
    for options in (b"", RECORD_ROUTE):
        host = Host(policy())
        host.run(0, "pre", "C:40000 > K:80 [S]")
        host.run(0, "open", "C:40000 @16000 from K:45678")
        host.run(0, "pre", "C:4000 > K:53")
        lines: list[str] = []
        host.worker.on_rewrite = lambda rewrite, p, _, lines=lines: lines.append(line(rewrite, p))
        for hook in Hook:
            host.worker.handle(template(packet, ip_options=options).build(), hook, 0)

        assert lines == [expected]


def test_a_line_shows_both_ends_where_both_have_changed_and_says_when_none_has() -> None:
    host = Host(policy(source=Source.RELAY))
    host.run(0, "post", "K:4000 > S:53")
    lines: list[str] = []
    host.worker.on_rewrite = lambda rewrite, packet, _: lines.append(line(rewrite, packet))
    host.run(0, "pre", "C:4000 > K:53")
    host.run(0, "pre", "C:40000 > K:80 [S]")
    host.run(0, "open", "C:40000 @16000 from K:45678")
    host.run(0, "post", "K:45678 > S:80 [S]")

    [moved] = [r.new for r in host.nat.tables[Hook.PREROUTING, Proto.UDP].values() if r.step == 4]
    port = int.from_bytes(moved[8:10])
    assert lines == [
        f"U1 10.0.0.1:4000 > 192.168.0.2:53 10 bytes => 10.0.0.1:{port} > 192.168.0.1:53 flow 1",
        "T1 10.0.0.1:40000 > 192.168.0.2:80 [S] => > 192.168.0.2:16000 flow 2",
        "T3 192.168.0.2:45678 > 192.168.0.1:80 [S] => unchanged flow 2",
    ]


def test_bytes_that_are_no_packet_still_make_a_line() -> None:
    rewrite = rows()["tcp"].rewrites[Step.T1]

    for nonsense in (b"", b"\xff" * 40):
        assert line(rewrite, nonsense) == f"T1 {len(nonsense)} bytes flow 1"


def rows() -> dict[str, Row]:
    nat = NatTable(rng=Random(1))
    tcp = nat.open_tcp(at("C:40000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 0)
    udp = nat.open_udp(at("C:4000"), at("K:53"), at("S:53"), Source.CLIENT, 0)
    other = nat.open_tcp(at("D:40000"), at("K:443"), at("S:443"), Source.CLIENT, 16000, 0)
    other.tracker.resumed()
    return {"tcp": tcp, "udp": udp, "other": other}


@pytest.mark.parametrize(
    ("wanted", "admitted"),
    [
        (Filter(), "tcp udp other"),
        (Filter(proto=Proto.TCP), "tcp other"),
        (Filter(proto=Proto.UDP), "udp"),
        (Filter(client_addr=addr("C")), "tcp udp"),
        (Filter(client_port=40000), "tcp other"),
        (Filter(client_addr=addr("C"), client_port=40000), "tcp"),
        (Filter(state="established"), "other"),
        (Filter(state="unreplied"), "udp"),
        (Filter(state="closed"), ""),
        (Filter(service=(Proto.TCP, 443)), "other"),
        (Filter(service=(Proto.UDP, 443)), ""),
        (Filter(proto=Proto.UDP, state="opening"), ""),
    ],
)
def test_a_filter_admits_what_all_its_parts_admit(wanted: Filter, admitted: str) -> None:
    assert [name for name, row in rows().items() if wanted.admits(row)] == admitted.split()
