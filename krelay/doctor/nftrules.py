"""`nft -j list ruleset`, read into the values of firewall.

Only what can decide over a relay's packets is understood; every other condition becomes UNSURE, and
every other statement is passed over.  IPv6 never matches: the relay's packets are IPv4.
"""

import re
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any

from krelay.doctor.firewall import NEVER, UNSURE, Chain, Chains, Match, Rule, RuleVerdict
from krelay.rules.spec import instance_of

FAMILIES = ("ip", "inet", "netdev")

_META = {
    "iifname": "iif",
    "iif": "iif",
    "oifname": "oif",
    "oif": "oif",
    "l4proto": "proto",
}
_TERMINAL = {
    "accept": "accept",
    "drop": "drop",
    "reject": "drop",
    "queue": "queue",
    "return": "return",
    "dnat": "nat",
    "redirect": "nat",
    "snat": "snat",
    "masquerade": "snat",
    "tproxy": "tproxy",
    "notrack": "notrack",
    "synproxy": "drop",
    "flow": "flow",
}
_ICMP_TYPES = {"destination-unreachable": 3}
"""Only those that a relay sends need a number."""
_HANDLE = re.compile(r"^\s*(.*?)\s*# handle (\d+)$")
_TABLE = re.compile(r"^table (\S+) (\S+) \{")


def chains(listing: Mapping[str, Any], text: str = "") -> Chains:
    """The chains of IPv4 in a JSON listing; `text` is `nft -a list ruleset`, for the rules' texts.

    Tables that iptables made, which JSON shows without their meaning, are left out: see
    `made_by_iptables`.  Raises ValueError, KeyError or TypeError if it isn't such a listing.
    """
    entries = listing["nftables"]
    left_out = {("ip", name) for name in made_by_iptables(listing)}
    texts = _texts(text)
    sets = {
        (s["family"], s["table"], s["name"]): s.get("elem", [])
        for kind in ("set", "map")
        for entry in entries
        if (s := entry.get(kind))
    }
    rules: dict[tuple[str, str, str], list[Rule]] = {}
    for entry in entries:
        if (rule := entry.get("rule")) and rule["family"] in FAMILIES:
            family, table = rule["family"], rule["table"]
            words = texts.get((family, table, rule["handle"]), "a rule")
            named = {
                key[2]: elements for key, elements in sets.items() if key[:2] == (family, table)
            }
            found = _rules(rule["expr"], words, named)
            rules.setdefault((family, table, rule["chain"]), []).extend(found)
    result = []
    for entry in entries:
        chain = entry.get("chain")
        if not chain or chain["family"] not in FAMILIES:
            continue
        key = (chain["family"], chain["table"], chain["name"])
        if key[:2] in left_out:
            continue
        base = {}
        if "hook" in chain:
            base = {
                "hook": chain["hook"],
                "kind": chain.get("type", "filter"),
                "priority": int(chain.get("prio", 0)),
                "policy": chain.get("policy", "accept"),
            }
        result.append(Chain("nft", *key, tuple(rules.get(key, ())), **base))
    return tuple(result)


def made_by_iptables(listing: Mapping[str, Any]) -> frozenset[str]:
    """The tables of family ip that hold matches or targets of iptables, but for krelay's own."""
    return frozenset(
        rule["table"]
        for entry in listing["nftables"]
        if (rule := entry.get("rule")) and rule["family"] == "ip"
        if not instance_of(rule["table"])
        if any("xt" in expression for expression in rule["expr"])
    )


def _texts(text: str) -> dict[tuple[str, str, int], str]:
    found = {}
    family = table = ""
    for line in text.splitlines():
        if head := _TABLE.match(line):
            family, table = head.groups()
        elif rule := _HANDLE.match(line):
            found[family, table, int(rule[2])] = rule[1]
    return found


def _rules(
    expressions: Iterable[Mapping[str, Any]], text: str, sets: Mapping[str, Any]
) -> list[Rule]:
    """A rule; several where it looks its verdict up in a map or does more than one thing."""
    matches: list[Match] = []
    rules: list[Rule] = []
    for expression in expressions:
        ((kind, body),) = expression.items()
        if kind == "match":
            matches += _matches(body["op"], body["left"], body["right"], sets)
        elif kind == "vmap":
            for key, verdict in _elements(body["data"], sets):
                condition = _matches("==", body["key"], _value(key), sets)
                rules.append(Rule(text, (*matches, *condition), _verdict(verdict)))
        elif kind == "mangle":
            changes = body["key"].get("meta", {}).get("key") == "mark"
            rules.append(Rule(text, tuple(matches), RuleVerdict("mark" if changes else "continue")))
        elif kind in ("limit", "quota", "ct count", "xt", "connlimit"):
            matches.append(UNSURE)
        elif kind in _TERMINAL or kind in ("jump", "goto"):
            rules.append(Rule(text, tuple(matches), _verdict(expression)))
    return rules


def _verdict(expression: Mapping[str, Any]) -> RuleVerdict:
    ((kind, body),) = expression.items()
    if kind in ("jump", "goto"):
        return RuleVerdict(kind, body["target"])
    return RuleVerdict(_TERMINAL.get(kind, "continue"))


def _matches(op: str, left: Any, right: Any, sets: Mapping[str, Any]) -> list[Match]:
    """The conditions of one match; a port asks for its protocol as well."""
    negated = op == "!="
    if op not in ("==", "!=", "in"):
        return [UNSURE]
    if "concat" in left:
        return [_concat(left["concat"], right, sets, negated)]
    if "&" in left:
        return [_masked(left["&"], right, negated)]
    if "payload" in left:
        return _payload(left["payload"], _elements(right, sets), negated)
    if "meta" in left:
        key = left["meta"]["key"]
        if key == "nfproto":
            return [] if ("ipv4" in _elements(right, sets)) is not negated else [NEVER]
        if key == "pkttype":
            return [] if ("host" in _elements(right, sets)) is not negated else [NEVER]
        if key == "mark" and isinstance(right, int):
            return [Match("mark", (right, 0xFFFFFFFF), negated)]
        if key in _META:
            return [Match(_META[key], tuple(map(str, _elements(right, sets))), negated)]
    if "ct" in left:
        key = left["ct"]["key"]
        if key in ("state", "direction"):
            return [Match(key, tuple(map(str, _elements(right, sets))), negated)]
        if key == "status" and right in ("dnat", "snat"):
            return [] if negated else [NEVER]
    if "fib" in left:
        return [_fib(left["fib"], right, sets, negated)]
    return [UNSURE]


def _payload(what: Mapping[str, Any], values: list[Any], negated: bool) -> list[Match]:
    proto, field = what.get("protocol"), what.get("field")
    if proto == "ip" and field in ("saddr", "daddr"):
        return [Match("src" if field == "saddr" else "dst", _addresses(values), negated)]
    if proto == "ip" and field == "protocol":
        return [Match("proto", tuple(map(str, values)), negated)]
    if proto in ("tcp", "udp", "th"):
        asked = [] if proto == "th" else [Match("proto", (proto,))]
        if field in ("sport", "dport"):
            return [*asked, Match(field, _ranges(values), negated)]
        if field == "flags":
            return [*asked, _masked([what, values], values, negated)]
        return [*asked, UNSURE]
    if proto == "icmp":
        types = tuple(_ICMP_TYPES.get(value, value) for value in values)
        known = Match("icmp", types, negated) if field == "type" else UNSURE
        return [Match("proto", ("icmp",)), known]
    if proto in (
        "ip6",
        "icmpv6",
        "sctp",
        "dccp",
        "igmp",
        "esp",
        "ah",
        "arp",
        "vlan",
        "gre",
    ):
        return [NEVER]
    return [UNSURE]


def _masked(operands: list[Any], right: Any, negated: bool) -> Match:
    """`left & mask == right`, of flags of TCP and of the mark."""
    left, mask = operands
    if "meta" in left and left["meta"].get("key") == "mark" and isinstance(mask, int):
        return Match("mark", (right, mask), negated) if isinstance(right, int) else UNSURE
    payload = left.get("payload", left)
    if payload.get("protocol") == "tcp" and payload.get("field") == "flags":
        wanted = frozenset() if right == 0 else frozenset(_listed(right))
        return Match("flags", (frozenset(_listed(mask)), wanted), negated)
    return UNSURE


def _fib(what: Mapping[str, Any], right: Any, sets: Mapping[str, Any], negated: bool) -> Match:
    flags = _listed(what.get("flags", ()))
    if what.get("result") == "type" and flags in (["saddr"], ["daddr"]):
        field = "src_type" if flags == ["saddr"] else "dst_type"
        return Match(field, tuple(map(str, _elements(right, sets))), negated)
    if what.get("result") == "oif" and right in (False, 0):
        return NEVER if not negated else Match("any of", ((),))  # a route there is
    return UNSURE


def _concat(parts: list[Any], right: Any, sets: Mapping[str, Any], negated: bool) -> Match:
    options = []
    for element in _elements(right, sets):
        values = element.get("concat") if isinstance(element, dict) else None
        if values is None or len(values) != len(parts):
            return UNSURE
        option: list[Match] = []
        for part, value in zip(parts, values, strict=True):
            option += _matches("==", part, value, sets)
        options.append(tuple(option))
    return Match("any of", tuple(options), negated)


def _elements(right: Any, sets: Mapping[str, Any]) -> list[Any]:
    """The values on a match's right side, those of a named set included."""
    if isinstance(right, str) and right.startswith("@"):
        return [_value(element) for element in sets.get(right[1:], [])]
    if isinstance(right, dict) and "set" in right:
        return [_value(element) for element in _listed(right["set"])]
    return [_value(element) for element in _listed(right)]


def _value(element: Any) -> Any:
    """An element without its timeout, counter or comment."""
    if isinstance(element, dict) and "elem" in element:
        return element["elem"]["val"]
    return element


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _addresses(values: Iterable[Any]) -> tuple[tuple[int, int], ...]:
    ranges = []
    for value in values:
        if isinstance(value, dict) and "prefix" in value:
            net = IPv4Network(f"{value['prefix']['addr']}/{value['prefix']['len']}", strict=False)
            ranges.append((int(net[0]), int(net[-1])))
        elif isinstance(value, dict) and "range" in value:
            low, high = value["range"]
            ranges.append((int(IPv4Address(low)), int(IPv4Address(high))))
        else:
            net = IPv4Network(str(value), strict=False)
            ranges.append((int(net[0]), int(net[-1])))
    return tuple(ranges)


def _ranges(values: Iterable[Any]) -> tuple[tuple[int, int], ...]:
    ranges = []
    for value in values:
        if isinstance(value, dict):
            low, high = value["range"]
            ranges.append((int(low), int(high)))
        else:
            ranges.append((int(value), int(value)))
    return tuple(ranges)
