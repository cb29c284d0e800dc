"""What the control socket shows, as values and as text: flows, and values of one time."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from knet.endpoint import Proto
from krelay.nat.flow import Flow
from krelay.registration.messages import GAUGES
from krelay.steps import Side

Value = str | int | float | list[int] | dict[str, int]
Values = Mapping[str, Value]


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


def other_port_values(counts: Mapping[int, int]) -> dict[str, Value]:
    """The services whose server answers from other ports, in vain, with how often; none if none."""
    found = {f"udp/{port}": count for port, count in sorted(counts.items())}
    return {"other_port": found} if found else {}


def tcp_status_values(totals: Mapping[str, int]) -> dict[str, Value]:
    """What tcp-relays have now, of their totals (Relays.totals): connections open, bytes held."""
    return {f"tcp_{name}": count for name, count in totals.items() if name in GAUGES}


def text(values: Values) -> str:
    """`key=value` for each, with a blank between: pairs of numbers as 12/10, names as a:1,b:2."""
    return " ".join(f"{name}={_plain(value)}" for name, value in values.items())


def lines(all_values: Iterable[Values], as_json: bool) -> Iterator[str]:
    return (json.dumps(values) if as_json else text(values) for values in all_values)


def listing(values: Values, as_json: bool) -> Iterator[str]:
    """One value a line, or one JSON object."""
    if as_json:
        return iter([json.dumps(values)])
    return (f"{name}={_plain(value)}" for name, value in values.items())


def _plain(value: Value) -> str:
    match value:
        case list():
            return "/".join(map(str, value))
        case dict():
            return ",".join(f"{name}:{number}" for name, number in value.items())
        case _:
            return str(value)
