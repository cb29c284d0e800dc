"""A connection that broke ends the other like one that was closed."""

from functools import partial

from tests.tprox.broken import sound
from tests.tprox.broken.sound import Half, main, pair


def relay(halves: tuple[Half, Half]) -> None:
    """Until both have ended, or one broke."""
    try:
        sound.relay(halves)
    except OSError:
        return


if __name__ == "__main__":
    main(partial(pair, relay=relay))
