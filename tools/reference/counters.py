"""The counters, and the reasons for which packets aren't rewritten."""

from krelay.control.metrics import COUNTERS
from krelay.datapath.reasons import ALIASES, Reason
from tools.reference.markdown import code, table


def counters() -> str:
    """As `krelay counters` shows them."""
    return table(
        ("counter", "meaning"),
        (
            (code(m.name), m.sentence + (f" Formerly `{m.former}`." if m.former else ""))
            for m in COUNTERS
        ),
    )


def reasons() -> str:
    """Each reason, with its former word."""
    former = {reason: word for word, reason in ALIASES.items()}
    return table(
        ("reason", "meaning"),
        (
            (code(r), r.sentence + (f" Formerly `{former[r]}`." if r in former else ""))
            for r in Reason
        ),
    )
