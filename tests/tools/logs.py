"""The log of this process, which tests set up for themselves."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


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
