"""Questions as scapy reads them, answers as scapy makes them, and what becomes of each question."""

from itertools import cycle

import pytest
from scapy.layers.dns import DNS, DNSQR, DNSRR
from scapy.layers.inet import IP, UDP

from benchmarks import asker
from benchmarks.asker import Asking

CLIENT, SERVER = "10.0.0.1", ("10.0.0.254", 53)


def answer_to(packet: bytes, **changes: object) -> bytes:
    """What a server sends back for a question."""
    asked = IP(packet)
    record = DNSRR(rrname=asker.NAME, rdata="192.0.2.1")
    fields = {"id": asked[DNS].id, "qr": 1, "qd": asked[DNS].qd, "an": record, **changes}
    back = IP(src=asked.dst, dst=asked.src) / UDP(sport=53, dport=asked[UDP].sport)
    return bytes(back / DNS(**fields))


def asking(count: int = 200) -> Asking:
    return Asking(cycle(enumerate(asker.packets(CLIENT, SERVER, count))))


def sent(asks: Asking, now: float) -> list[bytes]:
    """All that it wants to send."""
    wanted = []
    while (packet := asks.next(now)) is not None:
        wanted.append(packet)
    return wanted


def test_a_question_is_a_query_for_the_names_address_from_a_port_of_its_own() -> None:
    made = [IP(packet) for packet in asker.packets(CLIENT, SERVER, 50)]
    assert len({(each.src, each[UDP].sport) for each in made}) == 50
    for number, each in enumerate(made):
        assert (each.dst, each[UDP].dport) == SERVER
        query = each[DNS]
        assert (query.id, query.qr, query.rd, query.qdcount) == (number, 0, 1, 1)
        question = query[DNSQR]
        assert (question.qname.decode(), question.qtype) == (asker.NAME + ".", 1)


@pytest.mark.parametrize(
    ("changes", "good"),
    [
        ({}, True),
        ({"id": 8}, False),
        ({"qr": 0}, False),
        ({"rcode": 2}, False),
        ({"an": []}, False),
        ({"an": DNSRR(rrname=asker.NAME, rdata="192.0.2.2")}, False),
    ],
)
def test_an_answer_is_one_to_that_question(changes: dict[str, object], good: bool) -> None:
    question = asker.packets(CLIENT, SERVER, 8)[7]
    assert asker.is_answer(answer_to(question, **changes), 7) == good


@pytest.mark.parametrize("length", range(0, 40, 3))
def test_a_packet_cut_short_is_no_answer(length: int) -> None:
    question = asker.packets(CLIENT, SERVER, 1)[0]
    assert not asker.is_answer(answer_to(question)[:length], 0)


def test_an_answer_lets_the_next_question_go() -> None:
    asks = asking()
    first = sent(asks, 0.0)
    assert len(first) == asker.UNDER_WAY
    asks.came(answer_to(first[3]))
    asks.came(answer_to(first[3]))  # it came twice: one answer
    assert len(sent(asks, 0.1)) == 1
    assert (asks.answered, asks.lost, asks.wrong) == (1, 0, 0)


def test_a_wrong_answer_is_counted_as_one() -> None:
    asks = asking()
    asks.came(answer_to(sent(asks, 0.0)[0], rcode=5))
    assert (asks.answered, asks.lost, asks.wrong) == (0, 0, 1)


def test_after_the_patience_a_question_is_lost_and_a_late_answer_none() -> None:
    asks = asking()
    first = sent(asks, 0.0)
    asks.came(answer_to(first[0]))
    [late] = sent(asks, 0.9)
    asks.give_up(asker.PATIENCE - 0.01)
    assert asks.lost == 0
    asks.give_up(asker.PATIENCE)
    assert asks.lost == asker.UNDER_WAY - 1
    asks.came(answer_to(first[1]))
    asks.came(answer_to(late))
    assert (asks.answered, asks.wrong) == (2, 0)


def test_what_is_no_answer_at_all_changes_nothing() -> None:
    asks = asking()
    sent(asks, 0.0)
    for packet in (b"", bytes(20), bytes(60)):
        asks.came(packet)
    assert (asks.answered, asks.lost, asks.wrong) == (0, 0, 0)
