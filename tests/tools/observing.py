"""An observer of the NAT table that a test writes in one line."""

from collections.abc import Callable
from typing import Any

from krelay.nat.events import IdleObserver
from krelay.nat.table import NatTable


def observe(nat: NatTable, **methods: Callable[..., Any]) -> None:
    """From now on these are called for the events of their names.

    >>> from random import Random
    >>> changed = []
    >>> observe(NatTable(rng=Random(1)), changed=changed.append)
    """
    observer = IdleObserver()
    for name, method in methods.items():
        assert hasattr(observer, name), name
        setattr(observer, name, method)
    nat.observers.add(observer)
