"""The stall limit counts from when there was something to hold: progress doesn't extend it."""

import time
from functools import partial

from tests.tprox.broken.sound import Channel, main, session

REST = 0.5
"""Seconds with nothing held: the clock begins anew.  A late sender is no rest."""


class Strict(Channel):
    """Has a clock that only runs."""

    emptied_at = 0.0

    def read(self) -> None:
        """As it should be, but that the clock runs on through a moment of nothing held."""
        began, rested = self.moved_at, not self.held and time.monotonic() > self.emptied_at + REST
        super().read()
        if not rested:
            self.moved_at = began

    def write(self) -> None:
        """As it should be, but for the clock."""
        began = self.moved_at
        super().write()
        self.moved_at = began
        if not self.held:
            self.emptied_at = time.monotonic()


if __name__ == "__main__":
    main(partial(session, channel=Strict))
