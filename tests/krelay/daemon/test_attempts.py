"""When relaying that failed is tried again, and how often that is told."""

from krelay.daemon.attempts import START_AGAIN_MOST, STEADY, TELL_AGAIN, Attempts


def failing(attempts: Attempts, now: float, reason: str = "no rules") -> float:
    """A try that fails now; the seconds until the next."""
    attempts.clear()
    attempts.failed(reason, now, again=True)
    wait = attempts.retry_in(now)
    assert wait is not None
    return wait


def test_each_try_is_twice_as_long_after_the_one_before() -> None:
    attempts = Attempts()
    waits = [failing(attempts, 1000.0 * n) for n in range(7)]
    assert waits == [2, 4, 8, 16, 32, 60, 60]
    assert START_AGAIN_MOST == 60


def test_a_change_of_the_config_begins_with_a_short_wait() -> None:
    attempts = Attempts()
    failing(attempts, 0)
    failing(attempts, 10)
    attempts.afresh()
    assert failing(attempts, 20) == 2


def test_only_steady_relaying_makes_the_next_failure_a_first_one() -> None:
    for lasted, wait in ((STEADY - 1, 8), (STEADY, 2)):
        attempts = Attempts()
        failing(attempts, 0)
        failing(attempts, 10)
        attempts.begun(20)
        attempts.failed("the queue is lost", 20 + lasted, again=True)
        assert attempts.retry_in(20 + lasted) == wait


def test_a_failed_start_long_after_steady_relaying_is_no_first_failure() -> None:
    attempts = Attempts()
    attempts.begun(0)
    attempts.failed("the queue is lost", 100, again=True)
    assert failing(attempts, 102) == 4


def test_it_is_due_at_its_time_and_not_where_it_is_not_wished() -> None:
    attempts = Attempts()
    attempts.failed("no rules", 0, again=True)
    assert [attempts.due(now) for now in (0, 1.9, 2)] == [False, False, True]
    attempts.clear()
    assert attempts.reason is None
    assert not attempts.due(100)
    attempts.failed("no rules", 0, again=False)
    assert attempts.retry_in(0) is None
    assert not attempts.due(100)


def test_a_start_that_waits_for_the_port_has_no_time() -> None:
    attempts = Attempts()
    failing(attempts, 0)
    attempts.failed("port 16000 is in use", 10, again=True)
    attempts.wait_for_port()
    assert attempts.reason
    assert attempts.waits_for_port
    assert attempts.retry_in(10) is None
    assert failing(attempts, 20) == 2


def test_the_same_reason_is_told_once_a_minute_and_another_at_once() -> None:
    attempts = Attempts()

    def told(reason: str, now: float) -> int | None:
        return attempts.failed(reason, now, again=True)

    assert told("no rules", 0) == 0
    assert told("no rules", 2) is None
    assert told("no queue", 3) == 0
    assert told("no rules", 4) == 0
    assert told("no rules", 4 + TELL_AGAIN) == 0
    attempts.begun(70)
    assert told("no rules", 71) == 0
