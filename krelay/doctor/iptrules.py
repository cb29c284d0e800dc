"""`iptables-save`, read into the values of firewall.

Only what can decide over a relay's packets is understood: an option that isn't becomes UNSURE, and
a target that isn't passes the packet on.  The rules' texts are the lines themselves.
"""

import shlex
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Network

from krelay.doctor.firewall import NEVER, UNSURE, Chain, Chains, Match, Rule, RuleVerdict

HOOKS = {
    "PREROUTING": "prerouting",
    "INPUT": "input",
    "FORWARD": "forward",
    "OUTPUT": "output",
    "POSTROUTING": "postrouting",
}
PRIORITIES = {"raw": -300, "mangle": -150, "nat": -100, "filter": 0, "security": 50}
"""linux/netfilter_ipv4.h; nat is 100 where packets leave, which makes no difference here."""

_TARGETS = {
    "ACCEPT": "accept",
    "DROP": "drop",
    "REJECT": "drop",
    "TARPIT": "drop",
    "RETURN": "return",
    "QUEUE": "queue",
    "NFQUEUE": "queue",
    "DNAT": "nat",
    "REDIRECT": "nat",
    "NETMAP": "nat",
    "SNAT": "snat",
    "MASQUERADE": "snat",
    "TPROXY": "tproxy",
    "NOTRACK": "notrack",
    "FLOWOFFLOAD": "flow",
    "MARK": "mark",
    "CONNMARK": "mark",
}
_HARMLESS_MODULES = ("comment",)


def chains(text: str, tool: str) -> Chains:
    """The chains of a listing that `tool`-save printed.

    Lines that make no sense are passed over: the tool has printed them, so it knows.
    """
    table = ""
    policies: dict[tuple[str, str], str] = {}
    rules: dict[tuple[str, str], list[Rule]] = {}
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":"):
            name, policy, *_ = [*line[1:].split(), "-"]
            policies[table, name] = "drop" if policy == "DROP" else "accept"
        elif line.startswith("-A "):
            shown = line if table == "filter" else f"-t {table} {line}"
            rules.setdefault((table, line.split()[1]), []).append(_rule(line, shown))
    result = []
    for (table, name), policy in policies.items():
        base = {}
        if name in HOOKS:
            base = {
                "hook": HOOKS[name],
                "kind": "nat" if table == "nat" else "filter",
                "priority": PRIORITIES.get(table, 0),
                "policy": policy,
            }
        found = tuple(rules.get((table, name), ()))
        result.append(Chain(tool, "ip", table, name, found, **base))  # type: ignore[arg-type]
    return tuple(result)


def _rule(line: str, shown: str) -> Rule:
    try:
        words = shlex.split(line)[2:]
    except ValueError:
        return Rule(shown, (UNSURE,), RuleVerdict("continue"))
    matches: list[Match] = []
    verdict = RuleVerdict("continue")
    module = ""
    position = 0
    while position < len(words):
        negated = words[position] == "!"
        position += negated
        if position == len(words):
            break
        option = words[position]
        values = []
        position += 1
        while position < len(words) and not _is_option(words[position]):
            values.append(words[position])
            position += 1
        if option in ("-j", "-g"):
            rest = words[position:]
            verdict = _verdict(option, values[0] if values else "", rest)
            break
        if option == "-m":
            module = values[0] if values else ""
            matches += _module(module)
        elif module not in _HARMLESS_MODULES or option in _OPTIONS:
            matches += _option(option, values, negated)
    return Rule(shown, tuple(matches), verdict)


def _is_option(word: str) -> bool:
    return word == "!" or (word.startswith("-") and len(word) > 1 and not word[1].isdigit())


def _verdict(option: str, target: str, rest: list[str]) -> RuleVerdict:
    if target == "CT":
        return RuleVerdict("notrack" if "--notrack" in rest else "continue")
    if target in _TARGETS:
        return RuleVerdict(_TARGETS[target])
    if target.isupper() and target in ("LOG", "NFLOG", "ULOG", "SET", "TRACE", "TCPMSS", "TTL"):
        return RuleVerdict("continue")
    return RuleVerdict("goto" if option == "-g" else "jump", target)


def _module(name: str) -> list[Match]:
    """What naming a module means by itself."""
    if name in ("tcp", "udp", "icmp"):
        return [Match("proto", (name,))]
    if name in ("icmp6", "sctp", "ah", "esp"):
        return [NEVER]
    if name in ("limit", "hashlimit", "connlimit", "recent", "statistic", "quota", "time"):
        return [UNSURE]
    return []


def _option(option: str, values: list[str], negated: bool) -> list[Match]:
    reader = _OPTIONS.get(option)
    if reader is None:
        return [UNSURE]
    try:
        match = reader(values)
    except (ValueError, IndexError):
        return [UNSURE]
    if match is NEVER or match is UNSURE:
        return [] if negated and match is NEVER else [match]
    return [match._replace(negated=negated is not match.negated)]


def _protocol(values: list[str]) -> Match:
    numbers = {"1": "icmp", "6": "tcp", "17": "udp"}
    name = numbers.get(values[0], values[0])
    return Match("any of", ((),)) if name in ("all", "0") else Match("proto", (name,))


def _addresses(field: str) -> Callable[[list[str]], Match]:
    def read(values: list[str]) -> Match:
        ranges = []
        for value in values[0].split(","):
            low, dash, high = value.partition("-")
            if dash:  # -m iprange
                ranges.append((int(IPv4Address(low)), int(IPv4Address(high))))
            else:
                net = IPv4Network(value, strict=False)
                ranges.append((int(net[0]), int(net[-1])))
        return Match(field, tuple(ranges))

    return read


def _ports(*fields: str) -> Callable[[list[str]], Match]:
    def read(values: list[str]) -> Match:
        ranges = []
        for value in values[0].split(","):
            low, colon, high = value.partition(":")
            ranges.append((int(low or 0), int(high or 0xFFFF) if colon else int(low)))
        if len(fields) == 1:
            return Match(fields[0], tuple(ranges))
        return Match("any of", tuple((Match(field, tuple(ranges)),) for field in fields))

    return read


def _link(field: str) -> Callable[[list[str]], Match]:
    def read(values: list[str]) -> Match:
        name = values[0]
        return Match(field, (name[:-1] + "*" if name.endswith("+") else name,))

    return read


def _icmp(values: list[str]) -> Match:
    kind, slash, _ = values[0].partition("/")
    if kind in ("any", "255"):
        return Match("proto", ("icmp",))
    return UNSURE if slash else Match("icmp", (int(kind),))


def _states(values: list[str]) -> Match:
    names = {name.lower() for name in values[0].split(",")}
    known = names & {"new", "established", "related", "invalid", "untracked"}
    return Match("state", tuple(sorted(known))) if known else NEVER  # DNAT, SNAT: not of ours


def _type(field: str) -> Callable[[list[str]], Match]:
    return lambda values: Match(field, tuple(values[0].lower().split(",")))


def _flags(values: list[str]) -> Match:
    every = ("fin", "syn", "rst", "psh", "ack", "urg")
    mask, wanted = (
        frozenset(every) if text == "ALL" else frozenset(text.lower().split(",")) - {"none"}
        for text in values[:2]
    )
    return Match("flags", (mask, wanted))


def _mark(values: list[str]) -> Match:
    value, _, mask = values[0].partition("/")
    return Match("mark", (int(value, 0), int(mask or "0xffffffff", 0)))


def _packet_type(values: list[str]) -> Match:
    return Match("any of", ((),)) if values[0] == "unicast" else NEVER


_OPTIONS: Mapping[str, Callable[[list[str]], Match]] = {
    "-p": _protocol,
    "-s": _addresses("src"),
    "-d": _addresses("dst"),
    "--src-range": _addresses("src"),
    "--dst-range": _addresses("dst"),
    "-i": _link("iif"),
    "-o": _link("oif"),
    "--sport": _ports("sport"),
    "--dport": _ports("dport"),
    "--sports": _ports("sport"),
    "--dports": _ports("dport"),
    "--ports": _ports("sport", "dport"),
    "--ctstate": _states,
    "--state": _states,
    "--ctdir": lambda values: Match("direction", (values[0].lower(),)),
    "--src-type": _type("src_type"),
    "--dst-type": _type("dst_type"),
    "--tcp-flags": _flags,
    "--syn": lambda _: _flags(["FIN,SYN,RST,ACK", "SYN"]),
    "--icmp-type": _icmp,
    "--mark": _mark,
    "--pkt-type": _packet_type,
    "-f": lambda _: NEVER,  # datagrams are whole where the relay's rules are
}
