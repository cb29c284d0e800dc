"""The first end of file closes both connections, after what came before it."""

from functools import partial

from tests.tprox.broken import sound
from tests.tprox.broken.sound import Channel, main, session


class Hasty(Channel):
    """Ends the way back with its own."""

    def step(self) -> None:
        """As it should be, but for the shutdown."""
        super().step()
        if self.sent_eof:
            raise EOFError


def relay(channels: tuple[Channel, Channel]) -> None:
    """Until one has ended."""
    try:
        sound.relay(channels)
    except EOFError:
        return


if __name__ == "__main__":
    main(partial(session, channel=Hasty, relay=relay))
