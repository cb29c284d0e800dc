"""Instead of held bytes, silence is what is timed: a connection without any ends, whatever for."""

import time
from functools import partial

from tests.tprox.broken.sound import Half, main, pair


class Impatient(Half):
    """Judges each direction by itself, with nothing held as well."""

    @property
    def overdue(self) -> bool:
        """No bytes have moved for too long, though some may come."""
        return not self.sent_eof and time.monotonic() > self.moved_at + self.stall


if __name__ == "__main__":
    main(partial(pair, half=Impatient))
