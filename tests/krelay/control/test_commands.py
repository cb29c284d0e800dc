"""The control socket's language: every command, every error, and the columns of the contract."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from knet.endpoint import Proto, Source
from krelay.control.commands import HELP, BadRequest, Trace, answer, parse_filter
from krelay.control.views import Values
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.steps import Step
from krelay.trace.lines import Filter
from tests.tools.packets import addr, at

STATUS: Values = {"state": "running", "generation": 3, "uptime": 1.5}
COUNTERS: Values = {"T1": 12, "dropped_table_full": 0, "refused_10.0.0.9": {"a": 1, "b": 2}}
CONFIG: Values = {"generation": 3, "services": "tcp/80 udp/53"}


@dataclass
class FakeRelay:
    """What the daemon is to the control socket: tables and figures."""

    nat: NatTable = field(default_factory=lambda: NatTable(rng=Random(1)))
    killed: list[Flow] = field(default_factory=list)

    def counted(self, flows: Iterable[Flow]) -> Iterator[Flow]:
        return iter(flows)

    def traced(self, filters: Sequence[Filter]) -> None:
        pass

    def status(self) -> Values:
        return STATUS

    def counters(self) -> Values:
        return COUNTERS

    def config_in_force(self) -> Values:
        return CONFIG

    def kill(self, flow: Flow) -> None:
        self.killed.append(flow)

    def flush(self) -> int:
        self.killed += self.nat
        return len(self.nat)


def relay() -> FakeRelay:
    """A relay with a flow of TCP, one of UDP, and a client's own connection that was moved."""
    fake = FakeRelay()
    nat = fake.nat
    tcp = nat.open_tcp(at("C:40000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 100)
    nat.attach(tcp, at("K:45678"), 100)
    tcp.tracker.resumed()
    for step, packets, size, seen in ((Step.T1, 12, 2210, 103.1), (Step.T4, 10, 9931, 102)):
        rewrite = tcp.rewrites[step]
        rewrite.packets, rewrite.bytes, rewrite.seen_at = packets, size, seen
    udp = nat.open_forwarded(
        Proto.UDP, at("D:4000"), at("K:53"), at("S:53"), Source.RELAY, 101.04, relay_addr=addr("K")
    )
    udp.rewrites[Step.U1].packets, udp.rewrites[Step.U1].bytes = 1, 60
    nat.saw_direct(Proto.TCP, at("C:45678"), at("S:80"), 103)
    return fake


def asked(line: str, fake: FakeRelay | None = None, now: float = 103.2) -> list[str]:
    got = answer(line, fake or relay(), now)
    assert not isinstance(got, Trace)
    return list(got)


def refused(line: str) -> str:
    with pytest.raises(BadRequest) as caught:
        asked(line)
    return str(caught.value)


# show nat


def test_a_tcp_flow_has_the_columns_of_the_contract() -> None:
    assert asked("show nat")[0] == (
        "id=1 proto=tcp state=established client=10.0.0.1:40000 service=192.168.0.2:80 gport=16000 "
        "relay=192.168.0.2:45678 server=192.168.0.1:80 source=client age=3.2 idle=0.1 "
        "expires=7439.9 packets=12/10 bytes=2210/9931"
    )


def test_a_udp_flow_has_no_gateway_and_no_relay_port() -> None:
    assert asked("show nat")[1] == (
        "id=2 proto=udp state=unreplied client=10.0.0.9:4000 service=192.168.0.2:53 "
        "server=192.168.0.1:53 source=relay age=2.2 idle=2.2 expires=17.8 packets=1/0 bytes=60/0"
    )


def test_a_moved_connection_of_a_clients_own_shows_the_server_as_its_service() -> None:
    assert asked("show nat")[2].startswith(
        "id=3 proto=tcp state=opening client=10.0.0.1:45678 service=192.168.0.1:80 "
        "server=192.168.0.1:80 source=client age=0.2"
    )


def test_a_connection_without_a_server_leg_shows_no_relay_port() -> None:
    fake = FakeRelay()
    fake.nat.open_tcp(at("C:40000"), at("K:80"), at("S:80"), Source.CLIENT, 16000, 0)

    assert "gport=16000 server=192.168.0.1:80" in asked("show nat", fake)[0]


def test_times_never_read_below_zero() -> None:
    line = asked("show nat", now=0)[0]

    assert "age=0.0 idle=0.0" in line
    assert "expires=0.0" in asked("show nat", now=1e9)[0]


def test_json_says_the_same_as_text() -> None:
    for text, written in zip(asked("show nat"), asked("show nat json"), strict=True):
        values: dict[str, Any] = json.loads(written)
        pairs = {
            name: "/".join(map(str, value)) if isinstance(value, list) else str(value)
            for name, value in values.items()
        }
        assert " ".join(f"{name}={value}" for name, value in pairs.items()) == text
        assert isinstance(values["id"], int)
        assert isinstance(values["age"], float)
        assert len(values["packets"]) == 2


@pytest.mark.parametrize(
    ("words", "ids"),
    [
        ("", [1, 2, 3]),
        ("proto=tcp", [1, 3]),
        ("proto=udp", [2]),
        ("proto=UDP", [2]),
        ("client=10.0.0.1", [1, 3]),
        ("client=10.0.0.1:40000", [1]),
        ("client=10.0.0.9:1", []),
        ("state=opening", [3]),
        ("state=unreplied", [2]),
        ("state=closed", []),
        ("service=tcp/80", [1, 3]),
        ("service=udp/53", [2]),
        ("service=tcp/53", []),
        ("proto=tcp state=established client=10.0.0.1 service=tcp/80", [1]),
        ("proto=tcp state=unreplied", []),
    ],
)
def test_filters_select_flows(words: str, ids: list[int]) -> None:
    assert [json.loads(line)["id"] for line in asked(f"show nat json {words}")] == ids
    assert [json.loads(line)["id"] for line in asked(f"show nat {words} json")] == ids
    assert len(asked(f"show nat {words}")) == len(ids)


def test_flows_are_told_one_by_one_as_they_are_read() -> None:
    fake = relay()
    got = answer("show nat", fake, 103.2)
    assert not isinstance(got, Trace)

    first = next(got)
    fake.nat.clear()

    assert first.startswith("id=1 ")
    assert all(line.startswith("id=") for line in got), "rows that ended meanwhile do no harm"


# The other commands


@pytest.mark.parametrize(
    ("what", "values"), [("status", STATUS), ("counters", COUNTERS), ("config", CONFIG)]
)
def test_figures_are_a_line_each_or_one_object(what: str, values: Values) -> None:
    lines = [f"{name}={value}" for name, value in values.items()]
    if what == "counters":
        lines[-1] = "refused_10.0.0.9=a:1,b:2"
    assert asked(f"show {what}") == lines
    assert [json.loads(line) for line in asked(f"show {what} json")] == [values]


def test_kill_ends_the_flow_it_names_and_no_other() -> None:
    fake = relay()

    assert asked("kill 2", fake) == ["killed=2"]
    assert [flow.id for flow in fake.killed] == [2]


def test_flush_says_how_many_flows_it_ended() -> None:
    fake = relay()

    assert asked("flush", fake) == ["flushed=3"]
    assert len(fake.killed) == 3


def test_trace_takes_the_filters_of_show_nat() -> None:
    assert answer("trace", relay(), 0) == Trace(Filter())
    filters = "proto=udp client=10.0.0.1:5 state=closing service=tcp/443"
    wanted = Filter(Proto.UDP, addr("C"), 5, "closing", (Proto.TCP, 443))
    assert answer(f"trace {filters}", relay(), 0) == Trace(wanted)


def test_trace_takes_verdicts_and_may_be_a_capture() -> None:
    udp = Filter(Proto.UDP)
    assert answer("trace pcap", relay(), 0) == Trace(Filter(), pcap=True)
    assert answer("trace proto=udp pcap", relay(), 0) == Trace(udp, pcap=True)
    assert answer("trace verdict=pass", relay(), 0) == Trace(Filter(), frozenset({"pass"}))
    both = frozenset({"rewrite", "drop"})
    for words in ("", "verdict=rewrite,drop", "verdict=pass verdict=drop,rewrite"):
        assert answer(f"trace {words}", relay(), 0) == Trace(Filter(), both)


def test_help_lists_every_command() -> None:
    assert tuple(asked("help")) == HELP
    commands = {" ".join(line.split()[: 2 if line.startswith("show") else 1]) for line in HELP}
    assert commands == {
        "show nat", "show status", "show counters", "show config", "kill", "flush", "trace",
        "help",
    }  # fmt: skip


def test_blanks_around_words_do_not_matter() -> None:
    assert asked("  show \t status ") == asked("show status")


# Errors


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "no command; try help"),
        ("   ", "no command; try help"),
        ("frob", "'frob' is no command; try help"),
        ("SHOW nat", "'SHOW' is no command; did you mean show?"),
        ("shwo nat", "'shwo' is no command; did you mean show?"),
        ("show staus", "show what? one of nat, status, counters, config; did you mean status?"),
        ("show nat stat=closed", "'stat=closed' is no filter; did you mean state=?"),
        ("help me", "'help' is no command; try help"),
        ("show", "show what? one of nat, status, counters, config"),
        ("show rows", "show what? one of nat, status, counters, config"),
        ("show status now", "'now' isn't understood here; only json may follow"),
        ("show config json json", "'json' isn't understood here; only json may follow"),
        ("kill", "kill takes the id of one flow, as `show nat` lists it"),
        ("kill 1 2", "kill takes the id of one flow, as `show nat` lists it"),
        ("kill all", "kill takes the id of one flow, as `show nat` lists it"),
        ("kill -1", "kill takes the id of one flow, as `show nat` lists it"),
        ("kill ٣", "kill takes the id of one flow, as `show nat` lists it"),
        ("flush all", "'all' isn't understood here; flush stands alone"),
        ("kill 17", "no flow 17; `show nat` lists them"),
        ("show nat proto=icmp", "proto is tcp or udp, not 'icmp'"),
        ("show nat proto=", "proto is tcp or udp, not ''"),
        ("show nat client=", "client is ADDRESS or ADDRESS:PORT, not ''"),
        ("show nat client=here", "client is ADDRESS or ADDRESS:PORT, not 'here'"),
        ("show nat client=10.0.0.1:", "client is ADDRESS or ADDRESS:PORT, not '10.0.0.1:'"),
        ("show nat client=::1", "client is ADDRESS or ADDRESS:PORT, not '::1'"),
        ("show nat client=10.0.0.1:-5", "client is ADDRESS or ADDRESS:PORT, not '10.0.0.1:-5'"),
        ("show nat client=10.0.0.1:8_0", "client is ADDRESS or ADDRESS:PORT, not '10.0.0.1:8_0'"),
        ("show nat client=1.2.3.4:65536", "client is ADDRESS or ADDRESS:PORT, not '1.2.3.4:65536'"),
        ("show nat client=10.0.0.1:x", "client is ADDRESS or ADDRESS:PORT, not '10.0.0.1:x'"),
        (
            "show nat state=open",
            "state is one of opening, established, closing, closed, unreplied, replied, not 'open'",
        ),
        ("show nat service=80", "service is written tcp/80, not '80'"),
        ("show nat service=tcp/", "service is written tcp/80, not 'tcp/'"),
        ("show nat service=tcp/²", "service is written tcp/80, not 'tcp/²'"),
        ("show nat service=icmp/8", "proto is tcp or udp, not 'icmp'"),
        (
            "show nat port=80",
            "'port=80' is no filter; there are proto=, client=, state=, service=",
        ),
        ("trace json", "'json' is no filter; there are proto=, client=, state=, service="),
        ("trace verdict=", "verdict is one or more of rewrite,drop,pass, not ''"),
        ("trace verdict=drop,fly", "verdict is one or more of rewrite,drop,pass, not 'fly'"),
        (
            "show nat verdict=drop",
            "'verdict=drop' is no filter; there are proto=, client=, state=, service=",
        ),
        ("show nat pcap", "'pcap' is no filter; there are proto=, client=, state=, service="),
        ("x" * 50, repr("x" * 40 + "...") + " is no command; try help"),
    ],
)
def test_an_error_says_what_would_be_right(line: str, says: str) -> None:
    assert refused(line) == says


def test_a_refused_kill_ends_nothing() -> None:
    fake = relay()
    for line in ("kill 17", "kill 1 2", "kill"):
        with pytest.raises(BadRequest):
            answer(line, fake, 0)

    assert fake.killed == []


words = st.sampled_from(
    ["show", "nat", "status", "json", "kill", "trace", "help", "proto=", "client=", "client=::1",
     "client=1.2.3.4:", "state=", "service=", "service=tcp/", "service=tcp/²", "kill²", "=", "²"]
)  # fmt: skip


@given(
    st.text(max_size=80)
    | st.lists(words | st.text(max_size=8), max_size=6).map(" ".join)
    | st.lists(words, max_size=5).map("".join)
)
@example("kill " + "9" * 4000)
@example("show nat service=tcp/" + "9" * 4000)
@example("show nat client=10.0.0.1:" + "9" * 4090)
def test_any_text_is_answered_or_a_bad_request_of_one_line(line: str) -> None:
    try:
        got = answer(line, relay(), 103.2)
        lines = [] if isinstance(got, Trace) else list(got)
    except BadRequest as bad:
        lines = [str(bad)]

    assert all(each and "\n" not in each for each in lines)


def test_a_filter_of_nothing_admits_all() -> None:
    assert parse_filter([]) == Filter()
