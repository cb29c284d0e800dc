"""Skips what this machine can't run."""

import pytest

from benchmarks import ground


def need(*programs: str) -> None:
    """Skips the test unless these programs, or files by their path, are there."""
    if missing := ground.missing(programs):
        pytest.skip(f"{missing} isn't there")
