"""Tells the service manager that a daemon serves (sd_notify(3))."""

import os
import socket


def ready() -> str | None:
    """Sends READY=1 if NOTIFY_SOCKET asks for it; what went wrong, or None."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address[:1] not in ("/", "@"):
        return None
    try:
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        with socket.socket(socket.AF_UNIX, kind) as sock:
            sock.sendto(b"READY=1", address.replace("@", "\0", 1))
    except OSError as error:
        return error.strerror or str(error)
    return None
