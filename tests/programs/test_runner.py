"""The order of a trial, in a world that only writes down what is asked of it."""

from pathlib import Path
from typing import Any, cast

import pytest

from krelay_vm import LabError, LabTimeout, Result
from tests.net.world import World
from tests.programs import runner
from tests.programs.runner import Trial
from tests.programs.table import Client, Server
from tests.programs.ways import ways

SERVER = Server("server", ("tcp/7", "udp/7"), "serve", setup="prepare")
ASKS = Client("asks", "asker", "echo", "tcp", "ask $TO", (r"yes",))
SENDS = Client("sends", "sender", "echo", "udp", "send $TO", (r"yes",))
VERSIONS = {"server": "1", "asker": "1", "sender": "1"}
WAYS = list(ways(("queue",), ("client", "relay")))
DIRECT, RELAY = "10.0.0.1", "10.0.0.2"


class FakeProgram:
    """A server that runs until it is ended, or has ended with a status."""

    output = "its last words"

    def __init__(self, status: int | None) -> None:
        self.status = status

    def poll(self) -> int | None:
        return self.status

    def terminate(self) -> None:
        self.status = -15

    def wait(self, timeout: float = 10.0) -> int:
        return self.status or 0

    def kill(self) -> None:
        self.status = self.status or -9


class FakeWorld:
    """Is the lab, too."""

    server, relay, client, in_kernel = DIRECT, RELAY, "10.1.1.1", False

    def __init__(self, directory: Path) -> None:
        self.lab = self
        self.directory = directory
        self.done: list[str] = []
        self.answers: dict[str, Any] = {}
        self.program = FakeProgram(None)
        self.packets = 0

    def run(self, host: str, *argv: str, env: dict[str, str], **_: object) -> Result:
        self.done.append(f"{argv[-1].replace('$TO', env.get('TO', ''))}")
        answer = self.answers.get(self.done[-1], "yes")
        if isinstance(answer, BaseException):
            raise answer
        if env.get("TO") == self.relay:
            self.packets += 1
        return Result(0, answer, "", 0.1)

    def start(self, host: str, *argv: str, env: dict[str, str]) -> FakeProgram:
        self.done.append(argv[-1])
        return self.program

    def is_listening(self, host: str, proto: str, port: int) -> bool:
        return True

    def wait(self, condition: Any, what: str, timeout: float) -> None:
        if not condition():
            raise LabTimeout(f"{what}: not within {timeout:g} s")

    def put(self, **values: object) -> None:
        self.done.append(" ".join(f"{name}={value}" for name, value in values.items()))

    def until_state(self, state: str) -> None:
        self.done.append(state)

    def until(self, condition: Any, what: str) -> None:
        assert condition(), what

    def values(self, what: str) -> dict[str, int]:
        return dict.fromkeys(("T1", "U1"), self.packets)

    def soon(self, condition: Any, what: str) -> Any:
        found = condition()
        assert found, what
        return found


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWorld:
    """With one server in the table."""
    monkeypatch.setattr(runner, "SERVERS", {"echo": SERVER})
    monkeypatch.setattr("tests.programs.packages.SERVERS", {"echo": SERVER})
    return FakeWorld(tmp_path)


def trial(world: FakeWorld, told: list[str] | None = None) -> Trial:
    """Of that server."""
    return Trial(cast(World, world), "echo", VERSIONS, (told if told is not None else []).append)


def test_directly_first_then_in_every_way_of_its_protocol(world: FakeWorld) -> None:
    flows = trial(world).flows([ASKS, SENDS], WAYS)

    assert all(flow.is_as_expected for flow in flows)
    assert [[way.kind for way in flow.runs or ()] for flow in flows] == [
        ["terminated", "terminated", "forwarded", "forwarded"],
        ["relayed", "relayed"],
    ]
    stop, start = ["start=0", "stopped"], ["start=1", "running"]

    def way(services: str, source: str, ask: str) -> list[str]:
        setting = f"services={services} datapath=queue source={source}"
        return [*stop, setting, *start, f"{ask} {RELAY}"]

    assert world.done == [
        "prepare", "serve", *stop, f"ask {DIRECT}", f"send {DIRECT}",
        *way("tcp/7 udp/7", "client", "ask"), *way("tcp/7 udp/7", "relay", "ask"),
        *way("tcp/7=forward udp/7", "client", "ask"), *way("tcp/7=forward udp/7", "relay", "ask"),
        *way("tcp/7 udp/7", "client", "send"), *way("tcp/7 udp/7", "relay", "send"),
    ]  # fmt: skip


def test_what_fails_directly_is_not_tried_through_the_relay(world: FakeWorld) -> None:
    world.answers = {f"ask {DIRECT}": "no"}
    (flow,) = trial(world).flows([ASKS], WAYS)

    assert flow.fails_directly
    assert not flow.runs
    assert f"ask {RELAY}" not in world.done


def test_a_client_that_does_not_end_is_a_failure_of_its_own(world: FakeWorld) -> None:
    world.answers = {f"ask {RELAY}": LabTimeout("took longer")}
    told: list[str] = []
    asks, sends = trial(world, told).flows([ASKS, SENDS], WAYS)

    assert set(asks.troubles.values()) == {"no end within 20 s"}
    assert sends.is_as_expected
    assert "asks: terminated queue client, 20.0 s: no end within 20 s" in told


def test_what_went_round_the_relay_does_not_count(world: FakeWorld) -> None:
    world.relay = DIRECT
    world.values = lambda what: {"T1": 7, "U1": 7}  # type: ignore[method-assign]
    (flow,) = trial(world).flows([ASKS], WAYS)

    assert set(flow.troubles.values()) == {"no packet of it went through the relay"}


def test_a_server_that_does_not_start_is_no_trial(world: FakeWorld) -> None:
    world.program = FakeProgram(3)
    told: list[str] = []
    (flow,) = trial(world, told).flows([ASKS], WAYS)

    assert flow.untried == "its server did not start: it ended with status 3"
    assert "its last words" in told[0]
    assert f"ask {DIRECT}" not in world.done


def test_a_missing_package_is_the_reason(world: FakeWorld) -> None:
    found = Trial(cast(World, world), "echo", {"server": "1", "sender": "1"}, print).flows(
        [ASKS, SENDS], WAYS
    )

    assert [flow.untried for flow in found] == ["needs asker", ""]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_the_server_is_ended_whatever_happens(world: FakeWorld, error: BaseException) -> None:
    world.answers = {f"ask {DIRECT}": error}

    with pytest.raises(type(error)):
        trial(world).flows([ASKS], WAYS)
    assert world.program.status == -15
    assert not list(world.directory.iterdir())


def test_a_lab_that_fails_is_told_as_it_is(world: FakeWorld) -> None:
    world.answers = {"prepare": LabError("no room")}
    (flow,) = trial(world).flows([ASKS], WAYS)

    assert flow.untried == "its server did not start: no room"
