"""Not only held bytes are timed, but silence as well: a conversation that pauses ends."""

import time
from functools import partial

from tests.tprox.broken import sound
from tests.tprox.broken.sound import Half, main, pair


class Impatient(Half):
    """Is overdue with nothing held as well, once both sides have spoken."""

    made_at: float
    back: "Impatient"

    @property
    def overdue(self) -> bool:
        """Held bytes have not moved for too long, or none in either direction."""
        both = (self, self.back)
        spoken = not self.sent_eof and all(half.moved_at > half.made_at for half in both)
        silent_since = max(half.moved_at for half in both)
        return super().overdue or (spoken and time.monotonic() > silent_since + self.stall)


def relay(halves: tuple[Half, Half]) -> None:
    """As it should be, but that each half knows the other."""
    for half, back in (halves, halves[::-1]):
        assert isinstance(half, Impatient)
        assert isinstance(back, Impatient)
        half.made_at, half.back = half.moved_at, back
    sound.relay(halves)


if __name__ == "__main__":
    main(partial(pair, half=Impatient, relay=relay))
