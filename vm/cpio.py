"""An archive that the kernel unpacks into its first file system (cpio, the format `newc`).

See Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.  It unpacks no file
into a folder that the archive hasn't made before, so folders come first.
"""

from collections.abc import Iterable
from typing import NamedTuple

MAGIC = b"070701"
TRAILER = "TRAILER!!!"

FOLDER = 0o040755
FILE = 0o100644
PROGRAM = 0o100755
CHARACTER_DEVICE = 0o020600


class Entry(NamedTuple):
    """A file, folder or device; `mode` says which, and what is permitted."""

    name: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


def archive(entries: Iterable[Entry]) -> bytes:
    """The archive of these entries, all of them root's."""
    listed = [*entries, Entry(TRAILER, 0)]
    return b"".join(_emit(number, entry) for number, entry in enumerate(listed))


def _emit(number: int, entry: Entry) -> bytes:
    name = entry.name.encode() + b"\0"
    owner, links, time, check = (0, 0), 1, 0, 0
    fields = (number, entry.mode, *owner, links, time, len(entry.data), 0, 0, *entry.device)
    head = MAGIC + b"".join(b"%08X" % field for field in (*fields, len(name), check)) + name
    return _padded(head) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + b"\0" * (-len(data) % 4)
