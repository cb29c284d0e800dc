"""Input for iptables-restore: chains of one's own, hung into the built-in ones.  Pure."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class IptablesChain:
    """A chain of one's own and where it hangs."""

    table: str
    builtin: str
    name: str


def install(chain: IptablesChain, rules: Sequence[str], hung: frozenset[str]) -> str:
    """Makes the chain hold these rules and no others; `hung` are chains that are jumped to."""
    jump = [] if chain.name in hung else [f"-I {chain.builtin} 1 -j {chain.name}"]
    return "\n".join(
        [
            f"*{chain.table}",
            f":{chain.name} - [0:0]",  # made, or emptied, within the same commit
            *(f"-A {chain.name} {rule}" for rule in rules),
            *jump,
            "COMMIT",
            "",
        ]
    )


def remove(chains: Iterable[IptablesChain], hung: frozenset[str], present: frozenset[str]) -> str:
    """Takes out those of these chains that are there, in this order, a commit each."""
    lines = []
    for chain in chains:
        if chain.name not in present:
            continue
        jump = [f"-D {chain.builtin} -j {chain.name}"] if chain.name in hung else []
        ours = [*jump, f"-F {chain.name}", f"-X {chain.name}"]
        lines += [f"*{chain.table}", *ours, "COMMIT"]
    return "\n".join([*lines, ""])


def unlabelled(text: str) -> str:
    """The same rules without their labels.

    >>> unlabelled('-A own -p tcp -m comment --comment "T3" -j DROP')
    '-A own -p tcp -j DROP'
    """
    return re.sub(r' -m comment --comment "[^"]*"', "", text)
