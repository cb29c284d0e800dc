"""Not only held bytes are timed, but silence as well: a conversation that pauses ends."""

import time
from functools import partial

from tests.tprox.broken import sound
from tests.tprox.broken.sound import Channel, main, session


class Impatient(Channel):
    """Is overdue with nothing held as well, once both sides have spoken."""

    made_at: float
    back: "Impatient"

    @property
    def overdue(self) -> bool:
        """Held bytes have not moved for too long, or none in either direction."""
        both = (self, self.back)
        spoken = not self.sent_eof and all(channel.moved_at > channel.made_at for channel in both)
        silent_since = max(channel.moved_at for channel in both)
        return super().overdue or (spoken and time.monotonic() > silent_since + self.stall)


def relay(channels: tuple[Channel, Channel]) -> None:
    """As it should be, but that each channel knows the other."""
    for channel, back in (channels, channels[::-1]):
        assert isinstance(channel, Impatient)
        assert isinstance(back, Impatient)
        channel.made_at, channel.back = channel.moved_at, back
    sound.relay(channels)


if __name__ == "__main__":
    main(partial(session, channel=Impatient, relay=relay))
