"""The page of results, and their JSON."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tests.programs.packages import short
from tests.programs.table import Client, Server
from tests.programs.ways import KINDS, Kind, Run, Way, slower, unlike, wrong

HEAD = """\
# Programs that were tried

<!-- This page is made by `python -m tests.programs --markdown docs/compatibility.md`. -->

Real programs with their real servers, each once directly and then in every way through krelay: TCP
terminated by tcp-relay, TCP forwarded (`tcp/80=forward`), and UDP; with `datapath` `queue` and
`auto`, and with `source` `client` and `relay`. Directly means: to the server's own address, through
the same host, which routes then and doesn't relay. As directly: the exit status is the same, and so
is what the program shows of its result (bytes compared, answers, counts of requests); and krelay
has counted its packets. `python -m tests.programs --setup` installs the programs,
`python -m tests.programs` tries them.

"""
FOOT = """
"4 of 4": as directly with both data paths and both sources. What is said under "differs" holds in
all ways, unless it names some. A time is told where it is more than twice the direct one and a
second more; it was taken beside other work.
"""


@dataclass(frozen=True, slots=True)
class Row:
    """A client with what became of it: without a relay, and in each way.

    `untried` says why nothing was run; `versions` are those of the packages.
    """

    client: Client
    server: Server
    versions: Mapping[str, str]
    direct: Run | None = None
    runs: Mapping[Way, Run] | None = None
    untried: str = ""

    @property
    def troubles(self) -> dict[Way, str]:
        """The ways that aren't as good as none, each with the reason."""
        if self.direct is None:
            return {}
        runs = (self.runs or {}).items()
        found = ((way, unlike(self.client, self.direct, run)) for way, run in runs)
        return {way: reason for way, reason in found if reason}

    @property
    def fails_directly(self) -> str | None:
        """Why there is nothing to compare with, or None."""
        return None if self.direct is None else wrong(self.client, self.direct)

    @property
    def is_as_expected(self) -> bool:
        """Whether it went as directly, or failed as the table says."""
        if self.untried:
            return True
        known = {way for way in self.runs or () if is_known(self.client, way)}
        return self.fails_directly is None and self.troubles.keys() == known


def is_known(client: Client, way: Way) -> bool:
    """Whether the table says that it fails in this way."""
    words = client.fails_in or way
    return bool(client.fails) and any(word in words for word in way)


def page(flows: Sequence[Row], machine: str) -> str:
    """The page as Markdown."""
    good = sum(flow.is_as_expected and not flow.client.fails and not flow.untried for flow in flows)
    tried = sum(not flow.untried for flow in flows)
    lines = [
        f"{good} of {tried} programs went in all ways as they do directly. {machine}\n",
        "| program | server | terminated | forwarded | UDP | differs |",
        "|---|---|---|---|---|---|",
        *map(_line, flows),
    ]
    return HEAD + "\n".join(lines) + "\n" + FOOT


def _line(flow: Row) -> str:
    cells = [
        f"{flow.client.name} ({_version(flow, flow.client.package)})",
        f"{flow.server.package} ({_version(flow, flow.server.package)})",
        *(_cell(flow, kind) for kind in KINDS),
        "; ".join(_differences(flow)),
    ]
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _version(flow: Row, package: str) -> str:
    return short(flow.versions[package]) if package in flow.versions else "missing"


def _cell(flow: Row, kind: Kind) -> str:
    ways = [way for way in flow.runs or () if way.kind == kind]
    if not ways or flow.fails_directly:
        return ""
    return f"{sum(way not in flow.troubles for way in ways)} of {len(ways)}"


def _differences(flow: Row) -> Iterable[str]:
    if flow.untried:
        yield f"not tried: {flow.untried}"
    if flow.fails_directly:
        yield f"fails directly: {flow.fails_directly}"
        return
    if any(is_known(flow.client, way) for way in flow.troubles):
        yield f"fails: {flow.client.fails}"
    by_reason: dict[str, list[Way]] = {}
    for way, reason in flow.troubles.items():
        if not is_known(flow.client, way):
            by_reason.setdefault(reason, []).append(way)
    for reason, ways in by_reason.items():
        yield f"{', '.join(map(str, ways))}: {reason}"
    if flow.direct is not None and not flow.troubles:
        slow = slower(flow.direct, flow.runs or {})
        if slow:
            yield slow
    if flow.client.note:
        yield flow.client.note


def as_json(flow: Row) -> dict[str, Any]:
    """A flow for programs."""
    return {
        "program": flow.client.name,
        "transport": flow.client.transport,
        "versions": dict(flow.versions),
        "untried": flow.untried or None,
        "as_expected": flow.is_as_expected,
        "fails_directly": flow.fails_directly,
        "direct": flow.direct and asdict(flow.direct),
        "ways": [
            {**way._asdict(), "trouble": flow.troubles.get(way), **asdict(run)}
            for way, run in (flow.runs or {}).items()
        ],
    }
