"""What the options of both programs say of a session's limits."""

import argparse

from knet.relayoptions import add_options
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.service.options import limits


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser


def test_without_options_the_limits_are_the_default_ones() -> None:
    asked = parser().parse_args([])
    assert limits(asked) == SessionLimits()
    assert asked.workers == 1


def test_each_option_sets_its_limit() -> None:
    words = "--buffer 64K --stall 1 --half-close 2 --connect-timeout 3 --drain 0 --workers 4"
    asked = parser().parse_args(words.split())
    assert limits(asked) == SessionLimits(hold=65536, stall=1, half_close=2, connect=3, drain=0)
    assert asked.workers == 4
