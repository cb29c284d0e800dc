"""The counters, and the reasons for which packets aren't rewritten."""

from krelay.control.metrics import COUNTERS
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
