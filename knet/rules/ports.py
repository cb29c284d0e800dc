"""Ranges of ports, and sets of values, as nft and iptables write them.  Pure."""

from collections.abc import Iterable

MULTIPORT_MOST = 15
"""Ports in one multiport match; a range counts twice (net/netfilter/xt_multiport.c)."""

Ports = tuple[tuple[int, int], ...]
"""Ranges, both ends included, in order, none touching another."""


def merged(ports: Iterable[tuple[int, int]]) -> Ports:
    """The same ports as ordered ranges that don't touch.

    >>> merged([(80, 80), (443, 443), (81, 90), (85, 100)])
    ((80, 100), (443, 443))
    """
    result: list[tuple[int, int]] = []
    for low, high in sorted(ports):
        if result and low <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(high, result[-1][1]))
        else:
            result.append((low, high))
    return tuple(result)


def single(ports: Iterable[int]) -> Ports:
    """Each as a range of its own."""
    return tuple((port, port) for port in ports)


def nft_range(ports: tuple[int, int]) -> str:
    """
    >>> nft_range((80, 80)), nft_range((80, 90))
    ('80', '80-90')
    """
    first, last = ports
    return f"{first}-{last}" if last > first else f"{first}"


def nft_set(values: Iterable[object]) -> str:
    """
    >>> nft_set([80, 443])
    '{ 80, 443 }'
    """
    return "{ " + ", ".join(map(str, values)) + " }"


def nft_ports(ports: Ports) -> str:
    """The set of these."""
    return nft_set(map(nft_range, ports))


def iptables_range(ports: tuple[int, int]) -> str:
    """
    >>> iptables_range((80, 80)), iptables_range((80, 90))
    ('80', '80:90')
    """
    return nft_range(ports).replace("-", ":")


def multiport(ports: Ports) -> list[str]:
    """The lists of as many multiport matches as these need.

    >>> multiport(((80, 80), (8000, 8100)))
    ['80,8000:8100']
    """
    matches: list[list[str]] = []
    room = 0
    for low, high in ports:
        cost = 1 if low == high else 2
        if cost > room:
            matches.append([])
            room = MULTIPORT_MOST
        matches[-1].append(iptables_range((low, high)))
        room -= cost
    return [",".join(each) for each in matches]
