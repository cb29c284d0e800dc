"""What the options of tcp-relay and tcpproxy (knet/relayoptions.py) mean here."""

import argparse

from tcp_relay.engine.limits import SessionLimits


def limits(options: argparse.Namespace) -> SessionLimits:
    """What was asked for."""
    return SessionLimits(
        hold=options.buffer,
        stall=SessionLimits().stall if follows_stall(options) else options.stall,
        half_close=options.half_close,
        connect=options.connect_timeout,
        drain=options.drain,
    )


def follows_stall(options: argparse.Namespace) -> bool:
    """Whether that limit was not given, and there is another place to take it from."""
    return options.stall is None
