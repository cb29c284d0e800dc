"""A kernel that knows whose TCP connections are which, as SocketDiag asks it."""

from collections.abc import Sequence

from knet.endpoint import Endpoint

Ends = tuple[Endpoint, Endpoint]


class OneUser:
    """One in which all connections are one user's, as far as nothing else is said."""

    def __init__(self, uid: int | None = 0) -> None:
        self.uid = uid
        self.others: dict[Ends, int | None] = {}
        self.asked: list[list[Ends]] = []
        """What it was asked of many at once."""

    def carrier(self, local: Endpoint, remote: Endpoint, may_open: bool = False) -> int | None:
        """As SocketDiag."""
        return self.others.get((local, remote), self.uid)

    def carriers(self, ends: Sequence[Ends]) -> list[int | None]:
        """As SocketDiag."""
        self.asked.append(list(ends))
        return [self.carrier(*each) for each in ends]
