"""The control socket's language: a line in, lines out.

A request is a command and its words; an answer is lines, each `key=value` or JSON, then an empty
line.  An error is one line that says what would be right.  Answers are made flow by flow while they
are sent, so that a large table delays no packet.

    show nat [json] [proto=tcp|udp] [client=ADDR[:PORT]] [state=STATE] [service=tcp/80]
    show status [json]    show counters [json]    show config [json]
    flush    kill ID    trace [pcap] [filters] [verdict=rewrite,drop,pass]    help

A user who may only look (`may_change` false) has the same language without `kill`, `flush` and
`trace pcap`, which shows what is in packets.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Protocol

from knet.endpoint import Endpoint, Proto
from knet.roles import ADMIN, VIEW, needs_admin
from knet.usage import meant
from krelay.control.views import Values, flow_values, lines, listing
from krelay.datapath.verdict import Verdict
from krelay.nat.flow import Flow
from krelay.nat.table import NatTable
from krelay.nat.tcpstate import State
from krelay.trace.lines import REWRITE, WORDS, Filter

MAX_LINE = 4096
"""Bytes of a request."""

HELP = (
    "show nat [json] [proto=tcp|udp] [client=ADDR[:PORT]] [state=STATE] [service=tcp/80]",
    "show status [json]",
    "show counters [json]",
    "show config [json]",
    "kill ID",
    "flush (ends all flows to other servers than real_ip)",
    "trace [pcap] [filters as for show nat] [verdict=rewrite,drop,pass]",
    "help",
)

VIEW_HELP = tuple(
    line.replace("[pcap] ", "") for line in HELP if not line.startswith(("kill", "flush"))
)
"""What is left of it for a user who may only look."""

SHOWN = ("nat", "status", "counters", "config")
"""What `show` shows."""
FILTERS = ("proto=", "client=", "state=", "service=")


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
            return lines((flow_values(flow, timeouts, now) for flow in flows), as_json)
        case ["show", "status", *rest]:
            return listing(relay.status(), _as_json(rest))
        case ["show", "counters", *rest]:
            return listing(relay.counters(), _as_json(rest))
        case ["show", "config", *rest]:
            return listing(relay.config_in_force(), _as_json(rest))
        case ["show", *rest]:
            hint = meant(rest[0], SHOWN) if rest else ""
            raise BadRequest(f"show what? one of {', '.join(SHOWN)}{hint}")
        case ["kill", number] if number.isascii() and number.isdigit():
            flow = relay.nat.get(int(number))
            if flow is None:
                raise BadRequest(f"no flow {number}; `show nat` lists them")
            relay.kill(flow)
            return iter([f"killed={flow.id}"])
        case ["kill", *_]:
            raise BadRequest("kill takes the id of one flow, as `show nat` lists it")
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


def _as_json(words: Sequence[str]) -> bool:
    """Whether the words behind a command are just `json`.  Raises BadRequest for others."""
    if words and words != ["json"]:
        raise BadRequest(f"{_short(words[0])} isn't understood here; only json may follow")
    return bool(words)
