"""The messages of the relay socket, between tcp-relay and krelay (design: the relay socket).

One JSON object a message, one message a packet.  tcp-relay asks `open` (a new connection: which
server?), `resume` (after a reconnect: this one still lives) and tells `close`; krelay answers by
`id`, and tells `abort` when a flow was ended and its two connections must be reset.  Both ends use
this module alone: what one emits the other parses.

By `listening` tcp-relay says at which gateway port it listens, and hands over the descriptor of the
listening socket with the packet (SCM_RIGHTS); by `not_listening`, that it is about to close it.
Neither has an answer, but `listening` may be refused, by its `id`.

Beyond the fields of the contract there are some that a krelay which has lost its table can't know,
and that are left out where there is nothing to tell.  `service`: the address and port the client
asked for.  `source`: whose address the server sees.  `origin`: the client's own port, where the
connection came to tcp-relay under another (NatTable: the inside port).  `seen`: the client as the
server sees it, where that is from another port than `relay` (NatTable: the outside port).

`dscp`, in answers, are the DSCP with which the client sends and that of the server, left out where
both are 0.  By `marked` krelay tells that one of them has changed.

By `report`, which has no answer, tcp-relay tells its figures: `GAUGES` are how things are now,
everything else counts since that process began.  `worker` is a token that a process draws when it
begins.  It tells a process that has reconnected, and repeats its counts, from another one that adds
its own: krelay keeps the last report of each worker, not of each connection.  A report names all
there is, and is told anew on every connection, as krelay may know nothing of those before.

    >>> emit(Close(Endpoint.parse("192.168.0.2:45678")))
    b'{"op":"close","relay":["192.168.0.2",45678]}'
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from knet.endpoint import Endpoint, Source

MAX_MESSAGE = 4096
"""Bytes; no message is longer, so a longer packet is a malformed one."""

PORT_TAKEN = "relay port is taken"
NO_ADDRESS = "relay is no address of this host"
"""The one refusal after which tcp-relay tries again, with another relay port."""

GAUGES = ("open", "held")
"""Figures of a report that go up and down: connections open, bytes held."""

COUNTERS = (
    *("accepted", "opened"),
    *("closed", "reset", "stalled", "forgotten"),
    *("connect_failed", "refused", "drained", "killed"),
    *("from_client", "from_server"),
)
"""Figures of a report that only grow: connections begun, connections ended by reason, bytes.

They are shown in this order, and after them what else a tcp-relay may count.
"""

MAX_COUNTS = 32
"""Names in a report."""

_OPS = ("open", "resume", "close", "report", "listening", "not_listening")
_json = json.JSONEncoder(separators=(",", ":")).encode
_read = json.JSONDecoder().raw_decode
"""json.loads without the blanks around the value, which take it as long as the value itself."""
_OPENED = re.compile(
    rb'\{"id":(0|[1-9][0-9]{0,17})'
    rb'(,"server":\["[0-9.]{1,15}",[0-9]{1,5}\],"source":"[a-z]{1,9}"\})'
).fullmatch
"""An Opened as `emit` writes it: its number, and the rest."""
_BLANKS = " \t\r\n"  # RFC 8259, section 2
_SOURCES = {source.value: source for source in Source}
_COUNT_NAME = re.compile(r"[a-z_]{1,32}")
_WORKER = re.compile(r"[0-9a-f]{8}")


Dscps = tuple[int, int]
"""The DSCP (RFC 2474) with which the client's packets come, and that of the server's."""


class BadMessage(ValueError):
    """Bytes that are no message of this protocol.  The text says what is wrong."""


# No part changes a message; they aren't frozen because making one would take thrice as long.


@dataclass(slots=True, unsafe_hash=True)
class Open:
    """A client was accepted and relay port `relay` is bound: which server?"""

    id: int
    client: Endpoint
    gport: int
    relay: Endpoint
    service: Endpoint | None = None


@dataclass(slots=True, unsafe_hash=True)
class Resume:
    """A connection that lives on after krelay or the socket was gone."""

    id: int
    client: Endpoint
    gport: int
    relay: Endpoint
    server: Endpoint
    service: Endpoint | None = None
    source: Source | None = None
    origin: Endpoint | None = None
    seen: Endpoint | None = None


@dataclass(slots=True, unsafe_hash=True)
class Close:
    """Both legs of the connection with this relay port are closed."""

    relay: Endpoint


@dataclass(slots=True, unsafe_hash=True)
class Listening:
    """A listening socket, whose descriptor comes with the message."""

    gport: int
    id: int | None = None


@dataclass(slots=True, unsafe_hash=True)
class NotListening:
    """The socket that was handed over for this gateway port will be closed."""

    gport: int


@dataclass(slots=True, unsafe_hash=True)
class Report:
    """What `worker` counts: names `[a-z_]{1,32}`, at most MAX_COUNTS, values below 2**63.

    Equal are reports of the same worker with the same counts in any order; the hash is the
    worker's alone, since a mapping has none.
    """

    worker: str
    counts: Mapping[str, int] = field(hash=False)


@dataclass(slots=True, unsafe_hash=True)
class Opened:
    """Answer to Open: connect to `server`; it will see the address of `source`.

    `origin` is the client as its own packets read, where tcp-relay sees it with another port;
    `seen` as the server sees it, where that isn't from tcp-relay's port.
    """

    id: int
    server: Endpoint
    source: Source
    origin: Endpoint | None = None
    seen: Endpoint | None = None
    dscp: Dscps = (0, 0)


@dataclass(slots=True, unsafe_hash=True)
class Resumed:
    """Answer to Resume: the flow is there again."""

    id: int
    dscp: Dscps = (0, 0)


@dataclass(slots=True, unsafe_hash=True)
class Marked:
    """From krelay: an end of the flow with this relay port sends with another DSCP than before."""

    relay: Endpoint
    dscp: Dscps


@dataclass(slots=True, unsafe_hash=True)
class Refused:
    """Answer to Open, Resume or Listening (or, with id None, to something else)."""

    id: int | None
    error: str


@dataclass(slots=True, unsafe_hash=True)
class Abort:
    """From krelay: the flow with this relay port was ended; reset both its legs."""

    relay: Endpoint


Request = Open | Resume | Close | Listening | NotListening | Report
Answer = Opened | Resumed | Refused | Abort | Marked


def emit(message: Request | Answer) -> bytes:
    """The bytes of one packet."""
    m = message
    match m:  # in a class pattern each field would take as long as the class
        case Open():
            fields = f'"op":"open","id":{m.id},"client":{_pair(m.client)},"gport":{m.gport}'
            fields += f',"relay":{_pair(m.relay)}{_maybe("service", m.service)}'
        case Close():
            fields = f'"op":"close","relay":{_pair(m.relay)}'
        case Opened():
            fields = f'"id":{m.id},"server":{_pair(m.server)},"source":"{m.source}"'
            fields += _maybe("origin", m.origin) + _maybe("seen", m.seen)
            fields += _maybe_dscp(m.dscp)
        case Resume():
            fields = f'"op":"resume","id":{m.id},"client":{_pair(m.client)},"gport":{m.gport}'
            fields += f',"relay":{_pair(m.relay)},"server":{_pair(m.server)}'
            fields += _maybe("service", m.service)
            fields += f',"source":"{m.source}"' if m.source else ""
            fields += _maybe("origin", m.origin) + _maybe("seen", m.seen)
        case Resumed():
            fields = f'"id":{m.id}{_maybe_dscp(m.dscp)}'
        case Marked():
            fields = f'"op":"marked","relay":{_pair(m.relay)},"dscp":[{m.dscp[0]},{m.dscp[1]}]'
        case Listening():
            fields = f'"op":"listening","gport":{m.gport}'
            fields += f',"id":{m.id}' if m.id is not None else ""
        case NotListening():
            fields = f'"op":"not_listening","gport":{m.gport}'
        case Report():
            fields = f'"op":"report","worker":"{m.worker}","counts":{_json(dict(m.counts))}'
        case Refused():
            fields = f'"id":{_json(m.id)},"error":{_json(m.error)}'
        case Abort():
            fields = f'"op":"abort","relay":{_pair(m.relay)}'
    return f"{{{fields}}}".encode()


def parse_request(packet: bytes) -> Request:
    """What tcp-relay said.  Raises BadMessage, and nothing else, for any other bytes."""
    fields = _object(packet)
    match fields.get("op"):
        case "open":
            return Open(
                _id(fields),
                _endpoint(fields, "client"),
                _port(fields, "gport"),
                _endpoint(fields, "relay"),
                _maybe_endpoint(fields, "service"),
            )
        case "resume":
            return Resume(
                _id(fields),
                _endpoint(fields, "client"),
                _port(fields, "gport"),
                _endpoint(fields, "relay"),
                _endpoint(fields, "server"),
                _maybe_endpoint(fields, "service"),
                _source(fields) if "source" in fields else None,
                _maybe_endpoint(fields, "origin"),
                _maybe_endpoint(fields, "seen"),
            )
        case "close":
            return Close(_endpoint(fields, "relay"))
        case "report":
            return Report(_worker(fields), _counts(fields))
        case "listening":
            number = _id(fields) if fields.get("id") is not None else None
            return Listening(_port(fields, "gport"), number)
        case "not_listening":
            return NotListening(_port(fields, "gport"))
        case op:
            raise BadMessage(f"op {ascii(op)[:40]} is none of {', '.join(_OPS)}")


def parse_answer(packet: bytes) -> Answer:
    """What krelay said.  Raises BadMessage, and nothing else, for any other bytes."""
    if opened := _OPENED(packet):
        number, rest = opened.groups()
        server, source = _server_and_source(rest)
        return Opened(int(number), server, source)
    return _any_answer(packet)


@lru_cache(1024)
def _server_and_source(rest: bytes) -> tuple[Endpoint, Source]:
    """Of an Opened; they are the same for all connections to a service."""
    fields = _object(b'{"id":0' + rest)
    return _endpoint(fields, "server"), _source(fields)


def _any_answer(packet: bytes) -> Answer:
    fields = _object(packet)
    if fields.get("op") == "abort":
        return Abort(_endpoint(fields, "relay"))
    if fields.get("op") == "marked":
        return Marked(_endpoint(fields, "relay"), _dscp(fields))
    if "error" in fields:
        error = fields["error"]
        if not isinstance(error, str):
            raise BadMessage("error is not text")
        return Refused(None if fields.get("id") is None else _id(fields), error)
    if "server" in fields:
        server, origin = _endpoint(fields, "server"), _maybe_endpoint(fields, "origin")
        seen = _maybe_endpoint(fields, "seen")
        return Opened(_id(fields), server, _source(fields), origin, seen, _dscp(fields))
    return Resumed(_id(fields), _dscp(fields))


def _pair(endpoint: Endpoint) -> str:
    return f'["{endpoint.host}",{endpoint.port}]'


def _maybe(name: str, endpoint: Endpoint | None) -> str:
    return f',"{name}":{_pair(endpoint)}' if endpoint else ""


def _object(packet: bytes) -> dict[str, Any]:
    if len(packet) > MAX_MESSAGE:
        raise BadMessage(f"longer than {MAX_MESSAGE} bytes")
    try:
        text = packet.decode().strip(_BLANKS)
        fields, end = _read(text)
    except (ValueError, RecursionError) as error:
        raise BadMessage("not a JSON object") from error
    if end != len(text) or not isinstance(fields, dict):
        raise BadMessage("not a JSON object")
    return fields


def _integer(fields: dict[str, Any], name: str, low: int, high: int) -> int:
    value = fields.get(name)
    if type(value) is not int or not low <= value <= high:
        raise BadMessage(f"{name} is not a number from {low} to {high}")
    return value


def _id(fields: dict[str, Any]) -> int:
    return _integer(fields, "id", 0, 2**63 - 1)


def _port(fields: dict[str, Any], name: str) -> int:
    return _integer(fields, name, 1, 0xFFFF)


def _endpoint(fields: dict[str, Any], name: str) -> Endpoint:
    value = fields.get(name)  # not by `match`, which takes five times as long
    if type(value) is list and len(value) == 2:
        host, port = value
        if type(host) is str and type(port) is int and 1 <= port <= 0xFFFF:
            try:
                return Endpoint.of(host, port)
            except ValueError:
                pass
    raise BadMessage(f"{name} is not [ADDRESS, PORT]")


def _maybe_endpoint(fields: dict[str, Any], name: str) -> Endpoint | None:
    return _endpoint(fields, name) if fields.get(name) is not None else None


def _maybe_dscp(dscp: Dscps) -> str:
    return f',"dscp":[{dscp[0]},{dscp[1]}]' if any(dscp) else ""


def _dscp(fields: dict[str, Any]) -> Dscps:
    value = fields.get("dscp", [0, 0])
    if type(value) is list and len(value) == 2:
        client, server = value
        if all(type(each) is int and 0 <= each < 64 for each in value):
            return client, server
    raise BadMessage("dscp is not two numbers from 0 to 63")


def _source(fields: dict[str, Any]) -> Source:
    try:
        return _SOURCES[fields["source"]]
    except (KeyError, TypeError):
        raise BadMessage("source is none of client, relay") from None


def _worker(fields: dict[str, Any]) -> str:
    match fields.get("worker"):
        case str(worker) if _WORKER.fullmatch(worker):
            return worker
    raise BadMessage("worker is not eight hexadecimal digits")


def _counts(fields: dict[str, Any]) -> dict[str, int]:
    counts = fields.get("counts")
    if not isinstance(counts, dict) or len(counts) > MAX_COUNTS:
        raise BadMessage(f"counts is not an object of at most {MAX_COUNTS} names")
    if not all(map(_COUNT_NAME.fullmatch, counts)):
        raise BadMessage("counts has a name that is not [a-z_]{1,32}")
    return {name: _integer(counts, name, 0, 2**63 - 1) for name in counts}
