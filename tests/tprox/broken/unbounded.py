"""Reads for ever: whatever the sink doesn't take is held, however much it is."""

from functools import partial

from tests.tprox.broken.sound import Half, main, pair

if __name__ == "__main__":
    main(partial(pair, half=partial(Half, limit=1 << 60)))
