"""The messages of the relay socket: what one end emits the other parses, and nothing else."""

import json
from contextlib import suppress
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet.endpoint import Endpoint, Source
from krelay.registration.messages import (
    COUNTERS,
    GAUGES,
    MAX_COUNTS,
    MAX_MESSAGE,
    Abort,
    Answer,
    BadMessage,
    Close,
    Marked,
    Open,
    Opened,
    Refused,
    Report,
    Request,
    Resume,
    Resumed,
    emit,
    parse_answer,
    parse_request,
)

C = Endpoint.parse("10.0.0.1:40000")
Y = Endpoint.parse("192.168.0.2:45678")
S = Endpoint.parse("192.168.0.1:80")
K = Endpoint.parse("192.168.0.2:80")

ids = st.integers(0, 2**63 - 1)
ports = st.integers(1, 0xFFFF)
endpoints = st.builds(Endpoint, st.binary(min_size=4, max_size=4), ports)
sources = st.sampled_from(Source)
dscps = st.tuples(st.integers(0, 63), st.integers(0, 63))
count_names = st.sampled_from([*GAUGES, *COUNTERS]) | st.from_regex(r"[a-z_]{1,32}", fullmatch=True)
requests: st.SearchStrategy[Request] = st.one_of(
    st.builds(Open, ids, endpoints, ports, endpoints, st.none() | endpoints),
    st.builds(
        Resume, ids, endpoints, ports, endpoints, endpoints,
        st.none() | endpoints, st.none() | sources, st.none() | endpoints, st.none() | endpoints,
    ),
    st.builds(Close, endpoints),
    st.builds(
        Report,
        st.from_regex(r"[0-9a-f]{8}", fullmatch=True),
        st.dictionaries(count_names, ids, max_size=MAX_COUNTS),
    ),
)  # fmt: skip
answers: st.SearchStrategy[Answer] = st.one_of(
    st.builds(Opened, ids, endpoints, sources),
    st.builds(Opened, ids, endpoints, sources, st.none() | endpoints, st.none() | endpoints, dscps),
    st.builds(Resumed, ids),
    st.builds(Resumed, ids, dscps),
    st.builds(Marked, endpoints, dscps),
    st.builds(Refused, st.none() | ids, st.text(max_size=100)),
    st.builds(Abort, endpoints),
)

# The left column is the contract, to the letter.
REQUESTS: list[tuple[str, Request]] = [
    (
        '{"op":"open","id":1,"client":["10.0.0.1",40000],"gport":16000,'
        '"relay":["192.168.0.2",45678]}',
        Open(1, C, 16000, Y),
    ),
    (
        '{"op":"resume","id":2,"client":["10.0.0.1",40000],"gport":16000,'
        '"relay":["192.168.0.2",45678],"server":["192.168.0.1",80]}',
        Resume(2, C, 16000, Y, S),
    ),
    (
        '{"op":"resume","id":2,"client":["10.0.0.1",40000],"gport":16000,'
        '"relay":["192.168.0.2",45678],"server":["192.168.0.1",80],'
        '"service":["192.168.0.2",80],"source":"client"}',
        Resume(2, C, 16000, Y, S, K, Source.CLIENT),
    ),
    ('{"op":"close","relay":["192.168.0.2",45678]}', Close(Y)),
    (
        '{"op":"report","worker":"0a1b2c3d","counts":{"open":3,"accepted":10,"held":0}}',
        Report("0a1b2c3d", {"open": 3, "accepted": 10, "held": 0}),
    ),
]
ANSWERS: list[tuple[str, Answer]] = [
    ('{"id":1,"server":["192.168.0.1",80],"source":"client"}', Opened(1, S, Source.CLIENT)),
    ('{"id":1,"error":"no row for this client"}', Refused(1, "no row for this client")),
    ('{"id":2}', Resumed(2)),
    ('{"id":null,"error":"not a JSON object"}', Refused(None, "not a JSON object")),
    ('{"op":"abort","relay":["192.168.0.2",45678]}', Abort(Y)),
]


@pytest.mark.parametrize(("text", "message"), REQUESTS)
def test_requests_are_written_as_the_contract_says(text: str, message: Request) -> None:
    assert emit(message) == text.encode()
    assert parse_request(text.encode()) == message


@pytest.mark.parametrize(("text", "message"), ANSWERS)
def test_answers_are_written_as_the_contract_says(text: str, message: Answer) -> None:
    assert emit(message) == text.encode()
    assert parse_answer(text.encode()) == message


@given(message=requests)
def test_what_tcp_relay_emits_krelay_parses(message: Request) -> None:
    packet = emit(message)
    assert parse_request(packet) == message
    assert len(packet) <= MAX_MESSAGE


@given(message=answers)
def test_what_krelay_emits_tcp_relay_parses(message: Answer) -> None:
    assert parse_answer(emit(message)) == message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)
near_misses = st.builds(
    lambda message, name, value: json.dumps({**json.loads(emit(message)), name: value}).encode(),
    st.one_of(requests, answers),
    st.sampled_from(
        ["op", "id", "client", "gport", "relay", "server", "service", "source", "worker", "counts"]
    ),
    json_values,
)


@given(packet=st.one_of(st.binary(max_size=200), json_values.map(json.dumps).map(str.encode)))
def test_any_bytes_are_a_message_or_a_bad_one(packet: bytes) -> None:
    for parse in (parse_request, parse_answer):
        with suppress(BadMessage):
            parse(packet)


NUMBERS = ["0", "7", "07", "-7", "7.0", "9" * 18, str(2**63 - 1), "9" * 19]
HOSTS = ["192.168.0.1", "192.168.0.256", "192.168.0", "1.2.3.04", "::1", "."]
PORTS = ["80", "080", "0", "65535", "65536", "100000"]
RESTS = ['"client"', '"relay"', '"nobody"', '"client","id":9', '"client"}']


@pytest.mark.parametrize("number", NUMBERS)
def test_what_is_known_of_former_answers_changes_none(number: str) -> None:
    for host, port, rest in product(HOSTS, PORTS, RESTS):
        text = f'{{"id":{number},"server":["{host}",{port}],"source":{rest}}}'
        as_never_before = read(f" {text}")  # nobody writes it like that
        assert [read(text), read(text)] == [as_never_before] * 2


def read(text: str) -> Answer | str:
    """What that says, or is wrong with it."""
    try:
        return parse_answer(text.encode())
    except BadMessage as error:
        return str(error)


@given(packet=near_misses)
def test_a_wrong_field_makes_a_bad_message_and_no_other_error(packet: bytes) -> None:
    for parse in (parse_request, parse_answer):
        try:
            message = parse(packet)
        except BadMessage:
            continue
        assert parse(emit(message)) == message


def report(counts: object = None, worker: object = "0a1b2c3d") -> bytes:
    """A report that need not be right."""
    fields = {"op": "report", "worker": worker, "counts": {} if counts is None else counts}
    return json.dumps(fields).encode()


def names(number: int) -> dict[str, int]:
    """So many counts, each as long as can be."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    return {f"{letters[i // 26]}{letters[i % 26]}" * 16: 2**63 - 1 for i in range(number)}


def test_the_longest_report_is_a_message() -> None:
    longest = Report("0a1b2c3d", names(MAX_COUNTS))

    assert len(emit(longest)) <= MAX_MESSAGE
    assert parse_request(emit(longest)) == longest


def test_reports_are_equal_by_what_they_say_and_can_be_kept_in_a_set() -> None:
    one = Report("0a1b2c3d", {"open": 1, "held": 2})

    assert one == Report("0a1b2c3d", {"held": 2, "open": 1})
    assert one != Report("0a1b2c3d", {"open": 1})
    assert one != Report("ffffffff", one.counts)
    assert len({one, Report("0a1b2c3d", {"held": 2, "open": 1})}) == 1


def test_a_refusal_of_the_most_wordy_nonsense_is_still_a_message() -> None:
    for packet in (
        json.dumps({"op": "\x00" * 600}),
        json.dumps({"op": "\U0001f600" * 900}, ensure_ascii=False),
        json.dumps({"op": "report", "worker": "0a1b2c3d", "counts": {"\x00" * 600: 1}}),
    ):
        with pytest.raises(BadMessage) as refusal:
            parse_request(packet.encode())
        assert len(emit(Refused(None, str(refusal.value)))) <= MAX_MESSAGE


@pytest.mark.parametrize(
    ("packet", "words"),
    [
        (b"", "not a JSON object"),
        (b"[" * MAX_MESSAGE, "not a JSON object"),
        (b" " * MAX_MESSAGE + b"{}", "longer than 4096 bytes"),
        (b'{"op":"steal"}', "op 'steal' is none of open, resume, close, report"),
        (b'{"op":"close","relay":["192.168.0.2",0]}', "relay is not [ADDRESS, PORT]"),
        (b'{"op":"close","relay":["192.168.0.2",true]}', "relay is not [ADDRESS, PORT]"),
        (b'{"op":"close","relay":["localhost",1]}', "relay is not [ADDRESS, PORT]"),
        (b'{"op":"open","id":-1,"client":["10.0.0.1",1]}', "id is not a number"),
        (b'{"op":"open","id":true,"client":["10.0.0.1",1]}', "id is not a number"),
        (
            b'{"op":"open","id":1,"client":["10.0.0.1",1],"gport":70000}',
            "gport is not a number from 1 to 65535",
        ),
        (b'{"op":"report","counts":{}}', "worker is not eight hexadecimal digits"),
        (report(worker=12345678), "worker is not eight hexadecimal digits"),
        (report(worker="0A1B2C3D"), "worker is not eight hexadecimal digits"),
        (report(worker="0a1b2c3"), "worker is not eight hexadecimal digits"),
        (report(worker="0a1b2c3d\n"), "worker is not eight hexadecimal digits"),
        (b'{"op":"report","worker":"0a1b2c3d"}', "counts is not an object of at most 32 names"),
        (report([["open", 1]]), "counts is not an object of at most 32 names"),
        (report(names(MAX_COUNTS + 1)), "counts is not an object of at most 32 names"),
        (report({"": 1}), "counts has a name that is not [a-z_]{1,32}"),
        (report({"a" * 33: 1}), "counts has a name that is not [a-z_]{1,32}"),
        (report({"Open": 1}), "counts has a name that is not [a-z_]{1,32}"),
        (report({"open\n": 1}), "counts has a name that is not [a-z_]{1,32}"),
        (report({"open": -1}), "open is not a number from 0 to 9223372036854775807"),
        (report({"open": 2**63}), "open is not a number from 0 to 9223372036854775807"),
        (report({"open": 1.0}), "open is not a number"),
        (report({"open": True}), "open is not a number"),
        (report({"open": None}), "open is not a number"),
    ],
)
def test_a_bad_request_says_what_is_wrong(packet: bytes, words: str) -> None:
    with pytest.raises(BadMessage) as refusal:
        parse_request(packet)
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    "dscp", ["[0]", "[0,64]", "[-1,0]", "[1,2,3]", "46", '["a",0]', "[true,0]", "[1.5,0]", "null"]
)
def test_what_is_no_dscp_is_refused(dscp: str) -> None:
    for text in (
        f'{{"id":2,"dscp":{dscp}}}',
        f'{{"op":"marked","relay":["10.0.0.1",1],"dscp":{dscp}}}',
    ):
        with pytest.raises(BadMessage, match="dscp is not two numbers from 0 to 63"):
            parse_answer(text.encode())


def test_an_answer_without_a_dscp_is_as_short_as_ever() -> None:
    assert (
        emit(Opened(1, S, Source.CLIENT))
        == b'{"id":1,"server":["192.168.0.1",80],"source":"client"}'
    )
    assert emit(Resumed(2)) == b'{"id":2}'
