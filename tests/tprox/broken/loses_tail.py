"""At an end of file, what is held is thrown away."""

from functools import partial

from tests.tprox.broken.sound import Half, main, pair


class Forgetful(Half):
    """Holds nothing behind an end of file."""

    def read(self) -> None:
        """As it should be, but for the end."""
        super().read()
        if self.got_eof:
            self.held.clear()


if __name__ == "__main__":
    main(partial(pair, half=Forgetful))
