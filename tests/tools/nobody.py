"""Another user of this machine, who may read what all may, and tries what he can with it.

    with Nobody(lambda: fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX)) as nobody:
        assert nobody.said == "None"
        ...  # he holds what he has until here

He is a child of the test without any privilege.  Where he may go is up to the test: pytest's own
directories are closed to others, `open_directory` makes one that isn't.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

NOBODY = 65534

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user can be made by root alone")


class Somebody:
    """Another process, of our own user: does something, and stays until the end of the block."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act
        self.said = ""
        """What the act returned, or the name of the error that it raised."""

    def __enter__(self) -> Self:
        hearing, telling = os.pipe()
        waiting, self._leave = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                os.close(self._leave)
                os.close(hearing)
                self._change_user()
                try:
                    said = repr(self._act())
                except Exception as error:
                    said = type(error).__name__
                os.write(telling, said.encode())
                os.close(telling)
                os.read(waiting, 1)
            finally:
                os._exit(0)
        os.close(telling)
        os.close(waiting)
        while part := os.read(hearing, 4096):
            self.said += part.decode()
        os.close(hearing)
        return self

    def _change_user(self) -> None:
        """Becomes who is meant, in the process that is."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self._leave)
        os.waitpid(self._pid, 0)


class Nobody(Somebody):
    """The same as user nobody."""

    def _change_user(self) -> None:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)


def as_nobody(act: Callable[[], object]) -> str:
    """What user nobody gets of it: its result in Python's words, or the name of its error."""
    with Nobody(act) as nobody:
        return nobody.said


@contextmanager
def open_directory(mode: int = 0o755) -> Iterator[Path]:
    """A new directory with this mode that every user can come to."""
    path = Path(tempfile.mkdtemp(prefix="open-", dir="/tmp"))
    try:
        path.chmod(mode)
        yield path
    finally:
        with suppress(FileNotFoundError):
            shutil.rmtree(path)
