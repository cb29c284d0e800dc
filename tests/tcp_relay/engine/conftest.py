"""What tests of the engine share."""

import logging
from collections.abc import Iterator

import pytest

from knet.loop import Loop
from tcp_relay.engine.engine import Engine
from tests.tcp_relay.engine.rig import LONG, Log, Rig


@pytest.fixture
def loop() -> Iterator[Loop]:
    with Loop() as loop:
        yield loop


@pytest.fixture
def rig(loop: Loop) -> Iterator[Rig]:
    with Rig(Engine(loop, LONG)) as rig:
        yield rig


@pytest.fixture
def log() -> Iterator[Log]:
    logger, handler = logging.getLogger("krelay.connection"), Log()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield handler
    finally:
        logger.setLevel(before)
        logger.removeHandler(handler)
