"""The control socket's language: a line in, lines out.

A request is a command and its words; an answer is lines, each `key=value` or JSON, then an empty
line.  An error is one line that says what would be right.  Answers are made flow by flow while they
are sent, so that a large table delays no packet.

    show nat [json] [proto=tcp|udp] [client=ADDR[:PORT]] [state=STATE] [service=tcp/80]
    show status [json]    show counters [json]    show config [json]
    flush    kill ID    trace [pcap] [filters] [verdict=rewrite,drop,pass]    help

Who may only look (`may_change` false) has the same language without `kill`, `flush` and
`trace pcap`, which shows what is in packets.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Protocol

from knet.endpoint import Endpoint, Proto
from knet.roles import ADMIN, VIEW, needs_admin
from knet.usage import meant
from krelay.datapath.worker import PacketCounts, Verdict
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.nat.tcpstate import State
from krelay.registration.messages import GAUGES
from krelay.steps import Side, Step
from krelay.trace.lines import REWRITE, WORDS, Filter

MAX_LINE = 4096
"""Bytes of a request."""

HELP = (
    "show nat [json] [proto=tcp|udp] [client=ADDR[:PORT]] [state=STATE] [service=tcp/80]",
    "show status [json]",
    "show counters [json]",
    "show config [json]",
    "kill ID",
    "flush (ends all rows to other servers than real_ip)",
    "trace [pcap] [filters as for show nat] [verdict=rewrite,drop,pass]",
    "help",
)

VIEW_HELP = tuple(
    line.replace("[pcap] ", "") for line in HELP if not line.startswith(("kill", "flush"))
)
"""What is left of it for who may only look."""

SHOWN = ("nat", "status", "counters", "config")
"""What `show` shows."""
FILTERS = ("proto=", "client=", "state=", "service=")

Value = str | int | float | list[int] | dict[str, int]
Values = Mapping[str, Value]


class BadRequest(ValueError):
    """A request that can't be answered.  The text says what would be right."""


class RelayView(Protocol):
    """What can be asked."""

    nat: NatTable

    def counted(self, flows: Iterable[Flow]) -> Iterator[Flow]: ...
    def traced(self, filters: Sequence[Filter]) -> None: ...
    def status(self) -> Values: ...
    def counters(self) -> Values: ...
    def config_in_force(self) -> Values: ...
    def kill(self, flow: Flow) -> None: ...
    def flush(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Trace:
    """The answer to `trace`: from now on, a line for each packet of these flows.

    Packets that no flow claims are among them if they could be of such a flow.  With `pcap` it is a
    capture file instead of lines, which ends when the asker says that it has no more to ask.
    """

    filter: Filter
    verdicts: frozenset[str] = frozenset({REWRITE, WORDS[Verdict.DROP]})
    pcap: bool = False


def answer(
    line: str, relay: RelayView, now: float, *, may_change: bool = True
) -> Iterator[str] | Trace:
    """The lines that answer a request, without the empty one at the end.  Raises BadRequest."""
    words = line.split()
    if not may_change and needs_admin(words):
        what = "trace pcap" if words[0] == "trace" else words[0]
        raise BadRequest(
            f"{what} isn't for {VIEW.socket}, which only shows: ask {ADMIN.socket}, which is for "
            f"root and the group {ADMIN.group}"
        )
    match words:
        case []:
            raise BadRequest("no command; try help")
        case ["help"]:
            return iter(HELP if may_change else VIEW_HELP)
        case ["show", "nat", *rest]:
            as_json = "json" in rest
            wanted = parse_filter([word for word in rest if word != "json"])
            likely = wanted.in_any_state
            flows = relay.counted(flow for flow in relay.nat if likely.admits(flow))
            flows = (flow for flow in flows if wanted.admits(flow))
            timeouts = relay.nat.timeouts
            return _lines((flow_values(flow, timeouts, now) for flow in flows), as_json)
        case ["show", "status", *rest]:
            return _listing(relay.status(), rest)
        case ["show", "counters", *rest]:
            return _listing(relay.counters(), rest)
        case ["show", "config", *rest]:
            return _listing(relay.config_in_force(), rest)
        case ["show", *rest]:
            hint = meant(rest[0], SHOWN) if rest else ""
            raise BadRequest(f"show what? one of {', '.join(SHOWN)}{hint}")
        case ["kill", number] if number.isascii() and number.isdigit():
            flow = relay.nat.get(int(number))
            if flow is None:
                raise BadRequest(f"no row {number}; `show nat` lists them")
            relay.kill(flow)
            return iter([f"killed={flow.id}"])
        case ["kill", *_]:
            raise BadRequest("kill takes the id of one row, as `show nat` lists it")
        case ["flush"]:
            return iter([f"flushed={relay.flush()}"])
        case ["flush", word, *_]:
            raise BadRequest(f"{_short(word)} isn't understood here; flush stands alone")
        case ["trace", *rest]:
            return parse_trace(rest)
        case [word, *_]:
            known = dict.fromkeys(line.split()[0] for line in HELP)
            raise BadRequest(f"{_short(word)} is no command{meant(word, known) or '; try help'}")
    raise AssertionError(words)


def parse_filter(words: Iterable[str], *, known: Sequence[str] = FILTERS) -> Filter:
    """The flows that these words select; `known` may be meant by others.  Raises BadRequest."""
    found: dict[str, Any] = {}
    for word in words:
        name, _, value = word.partition("=")
        match name:
            case "proto":
                found["proto"] = _proto(value)
            case "client":
                found |= _client(value)
            case "state":
                if value not in set(State):
                    raise BadRequest(f"state is one of {', '.join(State)}, not {_short(value)}")
                found["state"] = value
            case "service":
                proto, _, port = value.partition("/")
                if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 0xFFFF):
                    raise BadRequest(f"service is written tcp/80, not {_short(value)}")
                found["service"] = (_proto(proto), int(port))
            case _:
                hint = meant(name, known) or f"; there are {', '.join(FILTERS)}"
                raise BadRequest(f"{_short(word)} is no filter{hint}")
    return Filter(**found)


def parse_trace(words: Sequence[str]) -> Trace:
    """What a trace is to show.  Raises BadRequest."""
    chosen = [word for word in words if word.startswith("verdict=")]
    rest = [word for word in words if word != "pcap" and word not in chosen]
    verdicts = frozenset(chosen[-1].removeprefix("verdict=").split(",") if chosen else ())
    if unknown := sorted(verdicts - {REWRITE, *WORDS.values()}):
        raise BadRequest(f"verdict is one or more of rewrite,drop,pass, not {_short(unknown[0])}")
    default = Trace(parse_filter(rest, known=(*FILTERS, "verdict=")), pcap="pcap" in words)
    return replace(default, verdicts=verdicts) if chosen else default


def flow_values(flow: Flow, timeouts: Any, now: float) -> dict[str, Value]:
    """A flow in the columns of the contract.  Times are seconds, to a tenth."""
    values: dict[str, Value] = {
        "id": flow.id,
        "proto": str(flow.proto),
        "state": str(flow.state),
        "client": str(flow.client),
        "service": str(flow.service),
    }
    if flow.gport is not None:
        values["gport"] = flow.gport
    if flow.proto is Proto.TCP and flow.relay is not None:
        values["relay"] = str(flow.relay)
    sides = (flow.by(Side.CLIENT), flow.by(Side.SERVER))
    return values | {
        "server": str(flow.server),
        "source": str(flow.source),
        "age": round(max(0.0, now - flow.created_at), 1),
        "idle": round(max(0.0, now - flow.seen_at), 1),
        "expires": round(max(0.0, flow.expires_at(timeouts) - now), 1),
        "packets": [side.packets if side else 0 for side in sides],
        "bytes": [side.bytes if side else 0 for side in sides],
    }


def counter_values(
    counts: PacketCounts,
    *,
    steps: Sequence[int],
    evicted: int,
    own_flows_evicted: int,
    refused: Mapping[bytes, dict[str, int]],
    errors: int,
    overflows: int,
    queue_dropped: int,
    socket_dropped: int,
    copies_lost: int = 0,
    log_lines_lost: int = 0,
    own_packets_stopped: int = 0,
) -> dict[str, Value]:
    """All counters by name: `steps`, drops and passes by reason, who was refused, the queue's.

    `icmp_T4` are ICMP errors that were translated as packets of step T4 are.
    """
    values: dict[str, Value] = dict(_by_step(steps))
    values |= {f"icmp_{step}": count for step, count in _by_step(counts.icmp)}
    dropped = {"table_full": 0, "client_full": 0, "client_rate": 0} | dict(
        sorted(counts.dropped.items())
    )
    values |= {f"dropped_{reason}": count for reason, count in dropped.items()}
    values |= {f"passed_{reason}": count for reason, count in sorted(counts.passed.items())}
    values["evicted"] = values["ended_early"] = evicted  # the latter for a release
    values["own_flows_evicted"] = own_flows_evicted
    values |= {f"refused_{ip_address(addr)}": reasons for addr, reasons in refused.items()}
    values["trace_lost"] = counts.trace_lost
    values["errors"] = errors
    values["queue_overflow"] = queue_dropped
    values["socket_overflow"] = socket_dropped
    values["overflow_notices"] = overflows
    values["copies_lost"] = copies_lost
    values["log_lines_lost"] = log_lines_lost
    values["own_packets_stopped"] = own_packets_stopped
    return values


def _by_step(counts: Sequence[int]) -> Iterator[tuple[str, int]]:
    """T1 to T4, U1 to U4, D1, D2: what takes two steps at once counts for both."""
    at_once = {Step.U1: Step.U12, Step.U2: Step.U12, Step.U3: Step.U34, Step.U4: Step.U34}
    for step in Step:
        if step in at_once:
            yield step.name, counts[step] + counts[at_once[step]]
        elif step not in at_once.values():
            yield step.name, counts[step]


def other_port_values(counts: Mapping[int, int]) -> dict[str, Value]:
    """The services whose server answers from other ports, in vain, with how often; none if none."""
    found = {f"udp/{port}": count for port, count in sorted(counts.items())}
    return {"other_port": found} if found else {}


def tcp_status_values(totals: Mapping[str, int]) -> dict[str, Value]:
    """What tcp-relays have now, of their totals (Relays.totals): connections open, bytes held."""
    return {f"tcp_{name}": count for name, count in totals.items() if name in GAUGES}


def tcp_counter_values(totals: Mapping[str, int]) -> dict[str, Value]:
    """What tcp-relays have counted, of their totals (Relays.totals)."""
    return {f"tcp_{name}": count for name, count in totals.items() if name not in GAUGES}


def text(values: Values) -> str:
    """`key=value` for each, with a blank between: pairs of numbers as 12/10, names as a:1,b:2."""
    return " ".join(f"{name}={_plain(value)}" for name, value in values.items())


def _lines(all_values: Iterable[Values], as_json: bool) -> Iterator[str]:
    return (json.dumps(values) if as_json else text(values) for values in all_values)


def _listing(values: Values, words: list[str]) -> Iterator[str]:
    """One value a line, or one JSON object."""
    if words == ["json"]:
        return iter([json.dumps(values)])
    if words:
        raise BadRequest(f"{_short(words[0])} isn't understood here; only json may follow")
    return (f"{name}={_plain(value)}" for name, value in values.items())


def _plain(value: Value) -> str:
    match value:
        case list():
            return "/".join(map(str, value))
        case dict():
            return ",".join(f"{name}:{number}" for name, number in value.items())
        case _:
            return str(value)


def _proto(word: str) -> Proto:
    try:
        return Proto[word.upper()]
    except KeyError:
        raise BadRequest(f"proto is tcp or udp, not {_short(word)}") from None


def _client(value: str) -> dict[str, Any]:
    try:
        if ":" in value:
            return dict(zip(("client_addr", "client_port"), Endpoint.parse(value), strict=True))
        return {"client_addr": ip_address(value).packed}
    except ValueError:
        raise BadRequest(f"client is ADDRESS or ADDRESS:PORT, not {_short(value)}") from None


def _short(word: str) -> str:
    return repr(word if len(word) <= 40 else word[:40] + "...")
