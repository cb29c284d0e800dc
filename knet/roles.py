"""Who may do what to a krelay that runs: its sockets, and the group whose members may use each.

    relay.sock     krelay        tcp-relay: what connections it has accepted and made
    control.sock   krelay-admin  all commands
    view.sock      krelay-view   the same, but for those that end flows or show what is in packets

Root may use all of them.  Where a group doesn't exist its socket is for root alone.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Role(NamedTuple):
    """A socket of the tree, and the group that it is for."""

    socket: str
    group: str


RELAY = Role("relay.sock", "krelay")
ADMIN = Role("control.sock", "krelay-admin")
VIEW = Role("view.sock", "krelay-view")


def needs_admin(words: Sequence[str]) -> bool:
    """Whether the words of a request are for control.sock alone: view.sock doesn't answer it.

    >>> needs_admin(["kill", "7"]), needs_admin(["trace", "proto=udp"])
    (True, False)
    >>> needs_admin(["trace", "proto=udp", "pcap"])
    True
    """
    return words[:1] in (["kill"], ["flush"]) or (words[:1] == ["trace"] and "pcap" in words)


def refusal(role: Role, *, exists: bool) -> str:
    """What a peer that may not connect is told; `exists`: whether this host has the group.

    >>> refusal(VIEW, exists=True)  # doctest: +NORMALIZE_WHITESPACE
    'view.sock is for root and the group krelay-view: run as root,
     or join the group krelay-view (usermod -aG krelay-view USER) and log in again'
    """
    how = f"join the group {role.group} (usermod -aG {role.group} USER) and log in again"
    if exists:
        return f"{role.socket} is for root and the group {role.group}: run as root, or {how}"
    return (
        f"{role.socket} is for root alone, as this host has no group {role.group}: run as root, "
        f"or make it (groupadd -r {role.group}), start krelay again, {how}"
    )
