"""The first end of file closes both connections, after what came before it."""

from functools import partial

from tests.tprox.broken import sound
from tests.tprox.broken.sound import Half, main, pair


class Hasty(Half):
    """Ends the way back with its own."""

    def step(self) -> None:
        """As it should be, but for the shutdown."""
        super().step()
        if self.sent_eof:
            raise EOFError


def relay(halves: tuple[Half, Half]) -> None:
    """Until one has ended."""
    try:
        sound.relay(halves)
    except EOFError:
        return


if __name__ == "__main__":
    main(partial(pair, half=Hasty, relay=relay))
