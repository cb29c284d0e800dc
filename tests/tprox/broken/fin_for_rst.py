"""A connection that broke ends the other like one that was closed."""

from functools import partial

from tests.tprox.broken import sound
from tests.tprox.broken.sound import Channel, main, session


def relay(channels: tuple[Channel, Channel]) -> None:
    """Until both have ended, or one broke."""
    try:
        sound.relay(channels)
    except OSError:
        return


if __name__ == "__main__":
    main(partial(session, relay=relay))
