"""What all of these need: the log is heard."""

import logging

import pytest


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("krelay"), "propagate", True)
    caplog.set_level(logging.INFO, logger="krelay")
