"""The observers of the NAT table: all are told, in their order."""

from random import Random

from krelay.nat.events import IdleObserver, NatObserver
from krelay.nat.table import NatTable
from tests.krelay.nat.test_table import open_tcp
from tests.tools.observing import observe

EVENTS = [name for name in vars(NatObserver) if not name.startswith("_")]


def test_observers_are_told_in_their_order() -> None:
    told: list[str] = []
    first = IdleObserver()
    first.changed = lambda flow: told.append("first")  # type: ignore[method-assign]
    nat = NatTable(rng=Random(1), observers=[first])
    observe(nat, changed=lambda flow: told.append("second"))

    open_tcp(nat)

    assert told == ["first", "second"]


def test_every_event_reaches_every_observer() -> None:
    nat = NatTable(rng=Random(1))
    told: list[tuple[str, int]] = []
    for number in range(2):
        observe(
            nat,
            **{name: lambda *_, at=(name, number): told.append(at) for name in EVENTS},
        )

    for name in EVENTS:
        event = getattr(nat.observers, name)
        event(*range(event.__code__.co_argcount - 1))

    assert told == [(name, number) for name in EVENTS for number in range(2)]
