"""Who lives, what is counted, and who hears that there is room again."""

from knet.loop import Loop
from tcp_relay.engine.counts import Row
from tcp_relay.engine.engine import Engine
from tcp_relay.engine.limits import SessionLimits
from tcp_relay.engine.session import End, Session
from tests.tcp_relay.helpers import run_for


class Connection:
    """Keeps what it is told, and tells the engine as legs do."""

    def __init__(self, engine: Engine, name: str = "10.0.0.1:40000") -> None:
        self.session = Session()
        self.engine = engine
        self.name = name
        self.ends: list[tuple[End, str]] = []
        self.looks = 0
        self.times_out = self.checks = 0
        engine.opened(self)

    def end(self, end: End, detail: str = "") -> None:
        self.ends.append((end, detail))
        self.engine.closed(self, end)

    def not_connected(self) -> None:
        self.times_out += 1

    def check_deadline(self) -> None:
        self.looks += 1

    def check(self) -> None:
        self.checks += 1

    def row(self) -> Row:
        return Row(self.name, "-", "open", 0.0, 0.0, 0, 0, "0/0")


def test_the_report_tells_who_lives_and_what_was() -> None:
    with Loop() as loop:
        engine = Engine(loop, SessionLimits())
        one, two, three = (Connection(engine) for _ in range(3))
        assert len(engine) == 3
        one.end(End.CLOSED)
        two.session.up.hold(b"12345")
        three.session.down.hold(b"123")
        engine.counts.moved[1] += 7
        report = engine.report()
        assert list(report)[:2] == ["open", "held"]
        told = {name: count for name, count in report.items() if count}
        assert told == {"open": 2, "held": 8, "accepted": 3, "closed": 1, "from_server": 7}


def test_each_that_ends_makes_room_and_says_so_afterwards() -> None:
    with Loop() as loop:
        seen: list[tuple[int, int]] = []
        engine = Engine(
            loop,
            SessionLimits(),
            lambda: seen.append((len(engine), engine.counts.ends[End.CLOSED])),
        )
        connections = [Connection(engine) for _ in range(3)]
        for connection in connections:
            connection.end(End.CLOSED)
        assert seen == [(2, 1), (1, 2), (0, 3)]


def test_all_can_be_ended_at_once() -> None:
    with Loop() as loop:
        engine = Engine(loop, SessionLimits())
        connections = [Connection(engine) for _ in range(3)]
        engine.end_all(End.DRAINED, "too late")
        assert all(connection.ends == [(End.DRAINED, "too late")] for connection in connections)
        assert len(engine) == 0
        assert engine.counts.ends[End.DRAINED] == 3


def test_each_wait_has_its_own_limit() -> None:
    with Loop() as loop:
        engine = Engine(loop, SessionLimits(connect=0.02, stall=0.04, half_close=5.0))
        connecting, stalled, half_closed = (Connection(engine) for _ in range(3))
        engine.connecting.add(connecting)
        engine.stalled.add(stalled)
        engine.half_closed.add(half_closed)
        run_for(loop, 0.1)
        assert (connecting.times_out, connecting.looks) == (1, 0)
        assert (stalled.looks, half_closed.looks) == (1, 0)
        assert engine.half_closed.seconds == 5.0


def test_who_moves_is_checked_now_and_then() -> None:
    with Loop() as loop:
        engine = Engine(loop, SessionLimits(stall=10.0))
        assert engine.watched.seconds == 2.5
        engine = Engine(loop, SessionLimits(stall=0.01))  # an acknowledgement may take longer
        assert engine.watched.seconds == 1.0
        moving = Connection(engine)
        engine.watched.add(moving)
        run_for(loop, 1.1)
        assert (moving.checks, moving.looks) == (1, 0)


def test_the_table_has_all_in_the_order_they_came() -> None:
    with Loop() as loop:
        engine = Engine(loop, SessionLimits())
        for name in ("1.1.1.1:1", "3.3.3.3:3", "2.2.2.2:2"):
            Connection(engine, name)
        lines = engine.table().splitlines()
        assert [line.split()[0] for line in lines[1:4]] == ["1.1.1.1:1", "3.3.3.3:3", "2.2.2.2:2"]
        assert lines[4] == "open=3 accepted=3"


def test_the_buffer_is_as_long_as_what_may_be_held() -> None:
    with Loop() as loop:
        assert len(Engine(loop, SessionLimits(hold=12345)).view) == 12345
