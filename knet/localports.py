"""Local ports that the kernel gives to no program that asks for any: reserved ones (ip(7))."""

RESERVED = "/proc/sys/net/ipv4/ip_local_reserved_ports"


def reserved(text: str) -> frozenset[int]:
    """The ports of such a list, each wanted by a program of this host.

    The kernel gives them to no program that asks for any port (ip(7), ip_local_reserved_ports).
    Raises ValueError for what is no list.

    >>> sorted(reserved("8080,9148-9150\\n"))
    [8080, 9148, 9149, 9150]
    """
    found: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        low, _, high = part.partition("-")
        found.update(range(int(low), int(high or low) + 1))
    return frozenset(found)
