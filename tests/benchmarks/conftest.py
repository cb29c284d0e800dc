"""What tests of benchmarks share."""

import pytest

from benchmarks import dns, ground

WARM_UP = 0.2
"""Seconds before and after a reading; a busy machine may come late to it by that much."""


@pytest.fixture
def briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Senders go on for moments: readings are looked at, but nothing is compared with them."""
    monkeypatch.setattr(ground, "WARM_UP", WARM_UP)
    monkeypatch.setattr(dns, "_WARM_UP", WARM_UP)
