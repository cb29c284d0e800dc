"""The log of this process, which tests set up for themselves."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def restored() -> Iterator[None]:
    """Leaves the log as it was: where it goes, and what of it."""
    logger = logging.getLogger("krelay")
    before = (logger.handlers[:], logger.propagate, logger.level, logging.raiseExceptions)
    try:
        yield
    finally:
        logger.handlers[:], logger.propagate, logging.raiseExceptions = *before[:2], before[3]
        logger.setLevel(before[2])


def complaints(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages of warnings and errors, without their fields."""
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def fields(caplog: pytest.LogCaptureFixture, message: str) -> list[dict[str, object]]:
    """The fields of each event with this message."""
    found = [record for record in caplog.records if record.getMessage() == message]
    return [getattr(record, "fields", {}) for record in found]
