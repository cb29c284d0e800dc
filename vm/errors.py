"""What goes wrong in a lab."""


class LabError(Exception):
    """Something in the lab can't be done or has failed.  The text says what."""


class LabTimeout(LabError):
    """Something didn't happen in time.  The text says what was waited for."""
