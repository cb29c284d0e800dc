"""Plays phases on a field and tells what came of each, in order."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from tests.tprox.ends import Failure
from tests.tprox.field import Field, Stage
from tests.tprox.plan import Phase, Verdict, groups
from tests.tprox.scripts import SCRIPTS

Obituary = Callable[[], str | None]


def run(
    field: Field, phases: Sequence[Phase], stall: float, obituary: Obituary = lambda: None
) -> Iterator[Verdict]:
    """A verdict for each phase; `obituary` tells why the proxy is no more, if it isn't."""
    for group in groups(phases):
        with ThreadPoolExecutor(len(group)) as threads:
            try:
                running = [threads.submit(_play, field, phase, stall, obituary) for phase in group]
                for future in running:
                    yield future.result()
            except BaseException:
                field.cut()
                raise


def _play(field: Field, phase: Phase, stall: float, obituary: Obituary) -> Verdict:
    began = time.monotonic()
    reason = None
    try:
        with Stage(field, phase.patience(stall), stall, phase.chained) as stage:
            SCRIPTS[phase.name](stage)
    except Failure as failure:
        reason = str(failure)
    return Verdict(phase, time.monotonic() - began, obituary() or reason)
