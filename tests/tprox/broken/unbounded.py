"""Reads for ever: whatever the sink doesn't take is held, however much it is and however long."""

from functools import partial

from tests.tprox.broken.sound import Channel, main, session


class Patient(Channel):
    """Has no limit of either kind: how much is taken before one is a matter of speed."""

    overdue = False


if __name__ == "__main__":
    main(partial(session, channel=partial(Patient, limit=1 << 60)))
