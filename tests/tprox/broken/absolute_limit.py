"""The stall limit counts from when there was something to hold: progress doesn't extend it."""

from functools import partial

from tests.tprox.broken.sound import Half, main, pair


class Strict(Half):
    """Has a clock that only runs."""

    def write(self) -> None:
        """As it should be, but for the clock."""
        began = self.moved_at
        super().write()
        if self.held:
            self.moved_at = began


if __name__ == "__main__":
    main(partial(pair, half=Strict))
