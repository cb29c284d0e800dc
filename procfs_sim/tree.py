"""The names, defaults and texts of the file tree: what may stand in each file and what it means.

Each setting is one row of a table: the file, the field of Config that it fills, how its text is
read, how its value is written, and what is accepted.  Rules that one text can break live in the
readers; the one rule between two files of the tree is `conflicts`.  Rules of the host (is that
address ours? is that port taken?) are not known here; state.py is handed them.  Every value has one
canonical text, so that "the file shows the value in force" is a comparison.

    >>> parse("services", "tcp/8000-8100")
    (Service(proto='tcp', first=8000, last=8100, forced=False, forward=False, any_port=False),)
    >>> render("services", parse("services", "udp/053  tcp/80-80"))
    'udp/53 tcp/80'
    >>> parse("gport", "abc")
    Traceback (most recent call last):
    procfs_sim.tree.SettingRefused: 'abc' is not a port (1-65535)
"""

import re
import reprlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple, Self

DEFAULT_ROOT = "/run/krelay"
ROOT_VARIABLE = "KRELAY_ROOT"
"""The environment variable that moves the tree elsewhere."""

STATUS = ("status/state", "status/applied", "status/errors", "status/resumable")
DIRECTORIES = ("timeouts", "limits", "status")

MAX_PORT = 0xFFFF
MAX_SECONDS = 604800
MAX_FLOWS = 1_000_000
MAX_RATE = 1_000_000
MAX_SHOWN = 60
"""Characters of a refused text that its reason repeats."""

SSH = 22
BLANKS = " \t\r\n\v\f"


class SettingRefused(ValueError):
    """A text that is not accepted.  Its message is the reason, in one printable line."""


class Service(NamedTuple):
    """A protocol and its ports, `first` to `last` inclusive; `forced` if written with `!`.

    `forward`: TCP that no daemon terminates, rewritten end to end as UDP is; written `=forward`.
    `any_port`: UDP whose server may answer from any of its ports; written `+any-port`.
    """

    proto: str
    first: int
    last: int
    forced: bool = False
    forward: bool = False
    any_port: bool = False

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `tcp/80`, `udp/5000-5010`, `tcp/443=forward`, `udp/69+any-port` or `tcp/22!`.

        The `!` comes last: `tcp/22=forward!`.  Raises SettingRefused.

        tcp/22 must be forced, alone or inside a range: relaying it cuts off who administers the
        relay.
        """
        match = _SERVICE.fullmatch(text)
        if match is None and "," in text:
            apart = shown(" ".join(text.replace(",", " ").split()))[1:-1]
            raise SettingRefused(
                f"{shown(text)} is not a service; write blanks between services, {apart}"
            )
        if match is None:
            raise SettingRefused(
                f"{shown(text)} is not a service (like tcp/80, udp/53 or tcp/8000-8100)"
            )
        proto, low, high, early, mode, option, mark = match.groups()
        if mode is not None and mode != "forward":
            raise SettingRefused(
                f"{shown(text)} has a mode that is not forward (like tcp/443=forward)"
            )
        if option is not None and option != "any-port":
            raise SettingRefused(
                f"{shown(text)} has an option that is not any-port (udp/69+any-port)"
            )
        if early and (mode or option):
            whole = "=forward!" if mode else "+any-port!"
            raise SettingRefused(f"{shown(text)} has its ! in the middle; write it last, {whole}")
        if mode and proto == "udp":
            raise SettingRefused(
                f"{shown(text)}: udp is always forwarded; write it without =forward"
            )
        if option and proto == "tcp":
            raise SettingRefused(
                f"{shown(text)}: any-port is for udp; tcp answers from its own port"
            )
        first = int(low)
        last = first if high is None else int(high)
        if not (1 <= first <= MAX_PORT and 1 <= last <= MAX_PORT):
            raise SettingRefused(f"{shown(text)} has a port that is not in 1-{MAX_PORT}")
        if first > last:
            raise SettingRefused(f"{shown(text)} runs backwards; write {proto}/{last}-{first}")
        service = cls(
            proto, first, last, "!" in (early, mark), mode is not None, option is not None
        )
        if service.contains("tcp", SSH) and not service.forced:
            raise SettingRefused(
                f"{shown(text)} would relay ssh, tcp/{SSH}; write {service}! if you mean it"
            )
        return service

    def contains(self, proto: str, port: int) -> bool:
        """Whether that port of that protocol is among these."""
        return proto == self.proto and self.first <= port <= self.last

    def overlaps(self, other: "Service") -> bool:
        """Whether a port is in both."""
        same = self.proto == other.proto
        return same and self.first <= other.last and other.first <= self.last

    def __str__(self) -> str:
        ports = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        kind = "=forward" * self.forward + "+any-port" * self.any_port
        return f"{self.proto}/{ports}{kind}{'!' * self.forced}"


_SERVICE = re.compile(
    r"(tcp|udp)/([0-9]{1,9})(?:-([0-9]{1,9}))?(!?)(?!!)(?:=([a-z]{0,20}))?(?:\+([a-z-]{0,20}))?(!?)"
)


_SERVER = IPv4Address("192.168.0.10")


@dataclass(frozen=True, slots=True)
class Config:
    """The values of all settings at one time.  The field of `timeouts/udp` is `timeouts_udp`."""

    gport: int = 16000
    real_ip: IPv4Address = _SERVER
    start: bool = False
    services: tuple[Service, ...] = (
        Service("tcp", 80, 80),
        Service("tcp", 443, 443),
        Service("udp", 53, 53),
        Service("tcp", 53, 53),
    )
    source: str = "client"
    datapath: str = "auto"
    """`auto`: flows are offloaded where they can be; `queue`: every packet takes the slow path."""
    timeouts_udp: int = 300
    """Seconds, like all timeouts."""
    timeouts_udp_dns: int = 20
    timeouts_tcp_transitory: int = 240
    """RFC 5382 REQ-5: four minutes at least."""
    timeouts_tcp_established: int = 7440
    """RFC 5382 REQ-5: two hours and four minutes at least."""
    timeouts_stall: int = 300
    """tcp-relay's: for a peer that is there and takes none of the bytes that are held for it."""
    limits_flows: int = 65536
    limits_flows_per_client: int = 4096
    limits_new_flows_per_client: int = 0
    """Flows a second; 0: no limit."""
    limits_refusal: str = "reset"

    def serves(self, proto: str, port: int) -> bool:
        """Whether that port of that protocol is relayed."""
        return any(service.contains(proto, port) for service in self.services)

    @property
    def terminated(self) -> tuple[Service, ...]:
        """The services that tcp-relay is needed for."""
        return tuple(s for s in self.services if s.proto == "tcp" and not s.forward)

    @property
    def forwarded(self) -> tuple[Service, ...]:
        """The services whose packets pass this host, rewritten."""
        return tuple(s for s in self.services if s.proto == "udp" or s.forward)


DEFAULTS = Config()


class Setting(NamedTuple):
    """One settings file."""

    name: str
    read: Callable[[str], Any]
    write: Callable[[Any], str]
    accepted: str
    """For people: which texts are taken."""

    @property
    def field(self) -> str:
        """The field of Config."""
        return self.name.replace("/", "_")


def port(text: str) -> int:
    """A port number.  Raises SettingRefused."""
    return _number(text, MAX_PORT, "a port", units={})


def server(text: str) -> IPv4Address:
    """An address that a server can have.  Raises SettingRefused.

    The refused blocks are those of RFC 6890 that no host has; private and link-local addresses are
    fine.
    """
    try:
        address = IPv4Address(text)
    except AddressValueError:
        raise SettingRefused(f"{shown(text)} is not an IPv4 address{_instead(text)}") from None
    for wrong, kind in (
        (address == _BROADCAST, "the broadcast address"),
        (address.packed[0] == 0, "an unspecified address (0.0.0.0/8)"),
        (address.is_loopback, "a loopback address (127.0.0.0/8)"),
        (address.is_multicast, "a multicast address (224.0.0.0/4)"),
        (address.is_reserved, "a class E address (240.0.0.0/4)"),
    ):
        if wrong:
            raise SettingRefused(f"{shown(text)} is {kind}, no server has it")
    return address


def _instead(text: str) -> str:
    """What to write instead of a text that is no address, if that can be seen."""
    host, _, port = text.rpartition(":")
    if _is_address(host) and port.isdigit():
        return f"; write {host}, and the port in services"
    host, _, bits = text.partition("/")
    if _is_address(host) and bits.isdigit():
        return f"; write {host}"
    with suppress(AddressValueError):
        IPv6Address(text.strip("[]").partition("%")[0])
        return "; write the server's IPv4 address, IPv6 is not relayed"
    if re.fullmatch(r"[0-9]{1,3}(\.[0-9]{1,3}){3}", text):
        return "; its four numbers are 0-255, without zeros in front"
    if re.fullmatch(r"[A-Za-z0-9-]+(\.[A-Za-z0-9-]+)*\.?", text) and re.search("[A-Za-z]", text):
        return "; write the address of that name, names are not looked up"
    return ""


def _is_address(text: str) -> bool:
    with suppress(AddressValueError):
        IPv4Address(text)
        return True
    return False


_BROADCAST = IPv4Address("255.255.255.255")


def services(text: str) -> tuple[Service, ...]:
    """One service or more, in the order written; one written twice counts once.  Raises
    SettingRefused.

    Services that overlap without being the same are refused: the packet filter's sets refuse them
    too.
    """
    found = tuple(dict.fromkeys(Service.parse(word) for word in words(text)))
    if not found:
        raise SettingRefused(
            f"{shown(text)} names no service (like tcp/80, udp/53 or tcp/8000-8100)"
        )
    by_port = sorted(found)
    for one, next_one in pairwise(by_port):
        if one.overlaps(next_one):
            same_kind = one.forward == next_one.forward and one.any_port == next_one.any_port
            how = "write one range" if same_kind else "keep one"
            raise SettingRefused(f"'{one}' and '{next_one}' overlap; {how}")
    return found


def words(text: str) -> list[str]:
    """The words between blanks and newlines (the ASCII ones: no other blank is one here)."""
    return _WORD.findall(text)


_WORD = re.compile(f"[^{BLANKS}]+")


def _seconds(text: str) -> int:
    return _number(text, MAX_SECONDS, "a number of seconds", units=_SECONDS_OF)


def _flows(text: str) -> int:
    return _number(text, MAX_FLOWS, "a number of flows")


def _rate(text: str) -> int:
    return _number(text, MAX_RATE, "a number of flows a second", low=0)


_SECONDS_OF = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
_THOUSANDS = {"k": 1_000, "m": 1_000_000}


def _number(
    text: str, high: int, what: str, *, low: int = 1, units: Mapping[str, int] = _THOUSANDS
) -> int:
    # int() alone would take '+5', '1_0' and the digits of other scripts, and choke on very long
    # ones.
    number = int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else -1
    if not low <= number <= high:
        meant = _meant(text, units)
        hint = f"; write {meant}" if meant is not None and low <= meant <= high else ""
        raise SettingRefused(f"{shown(text)} is not {what} ({low}-{high}){hint}")
    return number


def _meant(text: str, units: Mapping[str, int]) -> int | None:
    """The number that a text like 5m, 1k, 65_536 or 65,536 stands for."""
    match = re.fullmatch(r"([0-9]{1,9}) ?([A-Za-z]{1,3})", text)
    if match is not None and (factor := units.get(match[2].lower())) is not None:
        return int(match[1]) * factor
    grouped = re.fullmatch(r"[0-9]{1,3}([_,' ][0-9]{3}){1,2}", text)
    return int(re.sub("[^0-9]", "", text)) if grouped is not None else None


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise SettingRefused(f"{shown(text)} is neither 0 nor 1")
    return text == "1"


def _source(text: str) -> str:
    return _either(text, "client", "relay")


def _path(text: str) -> str:
    return _either(text, "auto", "queue")


def _refusal(text: str) -> str:
    return _either(text, "reset", "drop")


def _either(text: str, one: str, other: str) -> str:
    if text not in (one, other):
        raise SettingRefused(f"{shown(text)} is neither {one} nor {other}")
    return text


def _list(found: tuple[Service, ...]) -> str:
    return " ".join(map(str, found))


def _bit(flag: bool) -> str:
    return str(int(flag))


# fmt: off
_TABLE = (
    Setting("gport",                       port,     str,   "1-65535, not a relayed tcp port"),
    Setting("real_ip",                     server,   str,   "an IPv4 address, not this host's own"),
    Setting("start",                       _flag,    _bit,  "1 relay, 0 don't"),
    Setting("services",                    services, _list, "tcp/80 tcp/9=forward udp/69+any-port"),
    Setting("source",                      _source,  str,   "client or relay"),
    Setting("datapath",                    _path,    str,   "auto or queue"),
    Setting("timeouts/udp",                _seconds, str,   "seconds, 1-604800"),
    Setting("timeouts/udp_dns",            _seconds, str,   "seconds, 1-604800"),
    Setting("timeouts/tcp_transitory",     _seconds, str,   "seconds, 1-604800"),
    Setting("timeouts/tcp_established",    _seconds, str,   "seconds, 1-604800"),
    Setting("timeouts/stall",              _seconds, str,   "seconds, 1-604800"),
    Setting("limits/flows",                _flows,   str,   "flows, 1-1000000"),
    Setting("limits/flows_per_client",     _flows,   str,   "flows, 1-1000000"),
    Setting("limits/new_flows_per_client", _rate,    str,   "flows a second, 1-1000000; 0: any"),
    Setting("limits/refusal",              _refusal, str,   "reset or drop"),
)
# fmt: on
SETTINGS: Mapping[str, Setting] = MappingProxyType({row.name: row for row in _TABLE})
"""All settings by the names of their files, in the order in which they are shown and judged."""


def parse(name: str, text: str) -> Any:
    """The value that `text` stands for in the file `name`; blanks around it don't matter.

    Raises SettingRefused, and nothing else, for a text that is not accepted; KeyError if there is
    no such setting.
    """
    return SETTINGS[name].read(text.strip(BLANKS))


def render(name: str, value: Any) -> str:
    """The canonical text of a value, without a newline: `parse` gives the value back."""
    return SETTINGS[name].write(value)


def in_force(name: str, config: Config) -> str:
    """The canonical text of the file `name` under `config`, without a newline."""
    return render(name, getattr(config, SETTINGS[name].field))


def conflicts(config: Config, changed: Collection[str]) -> dict[str, str]:
    """The rule between files: the gateway port is no relayed service.

    Name -> reason, for those of the two that changed.

    Only tcp counts: the relay daemon listens on tcp, and a relayed udp port of the same number
    meets no program of ours.
    """
    for service in config.services:
        if service.contains("tcp", config.gport):
            reasons = {
                "gport": f"'{config.gport}' is a relayed service port ({service})",
                "services": f"'{service}' holds the gateway port, {config.gport}",
            }
            return {name: reason for name, reason in reasons.items() if name in changed}
    return {}


def shown(text: str) -> str:
    """A text as a reason repeats it: quoted, in one line, printable, and short."""
    return _SHORT.repr(text)


_SHORT = reprlib.Repr()
_SHORT.maxstring = MAX_SHOWN
