"""A relayed connection and a direct one look the same to the two programs at their ends.

Each script is played on both, and both are held against the model (tests/tools/duplex.py, which
also says what can be compared at all).  The stories are those that relays get wrong, with their
answers written out, so that they hold the model too.  The random scripts are numbered, and what a
number gives never depends on anything else:

    KRELAY_SEED=123 pytest tests/tcp_relay/test_equivalence.py -k random            that one
    KRELAY_SEED=5000-9000 pytest tests/tcp_relay/test_equivalence.py -k random      others than here

A script that fails is printed with its number, without the steps that make no difference.
"""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.tcp_relay.helpers import BOUND, LOCALHOST, drain, free_port, reset, wait_for
from tests.tools.duplex import FLOOD, NAMES, NOMINAL, Answer, Model, Step, parse, random_script
from tests.tools.duplex_run import Ends, Run, Views, Way, play

SEEDS, BATCH = 2000, 250

STORIES = {
    "what was sent before a reset is read before it": """
        client write 100    => ok
        client abort        => ok
        server read 40      => ok 40
        server read all     => ECONNRESET 60
        server read all     => EOF
        server write 1      => EPIPE
    """,
    "a reset is passed on as a reset, before any byte too": """
        client abort        => ok
        server write 0      => ECONNRESET
        server write 1      => EPIPE
    """,
    "the server's reset too": """
        server abort        => ok
        client read all     => ECONNRESET
    """,
    "a reset after the end of file": """
        client write 10     => ok
        client shutdown     => ok
        client abort        => ok
        server read all     => EOF 10
        server write 1      => EPIPE
        server shutdown     => ENOTCONN
    """,
    "a reset by the one that got the end of file": """
        client shutdown     => ok
        server read all     => EOF
        server write 50     => ok
        server abort        => ok
        client read all     => ECONNRESET 50
    """,
    "closing with unread bytes resets": """
        client write 100    => ok
        server write 30     => ok
        server read 99      => ok 99
        server close        => ok
        client read all     => ECONNRESET 30
    """,
    "after the end of file data goes on the other way": """
        client write 5      => ok
        client shutdown     => ok
        server read all     => EOF 5
        client pause        => ok
        server write 1500   => ok
        client read all     => nothing 1500
        server flood        => ok
        client read all     => nothing
        server shutdown     => ok
        client read all     => EOF
        client shutdown     => ENOTCONN
    """,
    "a closed program's connection resets whoever writes to it": """
        client write 7      => ok
        client close        => ok
        server write 0      => ok
        server write 1      => ok
        server write 1      => EPIPE
        server read all     => EOF 7
    """,
    "both ends of file at once, with bytes before them": """
        client write 8000   => ok
        server write 8000   => ok
        client shutdown     => ok
        server shutdown     => ok
        client read all     => EOF 8000
        server read 8000    => ok 8000
        server read 1       => EOF
        client abort        => ok
        server write 1      => EPIPE
    """,
    "a writer waits for a reader that pauses": """
        client flood        => ok
        server pause        => ok
        server read 2000    => ok 2000
        server write 100    => ok
        client read all     => nothing 100
        server read all     => nothing
        client write 1      => ok
        server read all     => nothing 1
    """,
    "the end of file behind full buffers": """
        client flood        => ok
        client shutdown     => ok
        server write 100    => ok
        server read all     => EOF
        client read all     => nothing 100
    """,
    "closing behind full buffers": """
        server flood        => ok
        server close        => ok
        client pause        => ok
        client read all     => EOF
        client write 1      => ok
        client write 1      => EPIPE
    """,
    "a reset behind full buffers": """
        client flood        => ok
        client abort        => ok
        server pause        => ok
        server read all     => ECONNRESET
        server write 1      => EPIPE
    """,
    "a reset reaches a writer that waits": """
        client write 20     => ok
        client flood        => ok
        server write 20     => ok
        server abort        => ok
        client read all     => EOF 20
        client write 1      => EPIPE
    """,
    "a reset while both writers wait": """
        client flood        => ok
        server flood        => ok
        client abort        => ok
        server read all     => RST
        server write 1      => EPIPE
    """,
    "both writers wait, and are read": """
        client flood        => ok
        server flood        => ok
        server read all     => nothing
        client read all     => nothing
        server shutdown     => ok
        client shutdown     => ok
        server read all     => EOF
    """,
    "urgent bytes stay where they were sent": """
        client write 100    => ok
        client urgent       => ok
        client write 100    => ok
        client urgent       => ok
        client urgent       => ok
        server read 150     => ok 150
        server urgent       => ok
        server read all     => nothing 53
        client shutdown     => ok
        client read all     => nothing 1
        server read all     => EOF
    """,
    "writing nothing sends nothing": """
        client write 0      => ok
        server read all     => nothing
        client shutdown     => ok
        client write 0      => EPIPE
        server write 0      => ok
        server close        => ok
        client read all     => EOF
    """,
}

# What the random scripts must have had, so many times: the model's notes.
COVERED = {
    "abort": 200,
    "both full": 50,
    "close with unread bytes": 50,
    "FIN": 200,
    "FIN after FIN": 200,
    "FIN behind a flood": 50,
    "flood": 200,
    "flood to a closed peer": 10,
    "pause while full": 50,
    "read of bytes before a RST": 50,
    "RST after FIN": 50,
    "RST before any byte": 50,
    "RST behind a flood": 20,
    "RST to a blocked writer": 50,
    "RST to one with unread bytes": 50,
    "RST while both are full": 10,
    "shutdown of what is over": 50,
    "urgent": 100,
    "write after the other's FIN": 50,
    "write of nothing": 50,
    "write that fails": 50,
    "write to a closed peer": 50,
}

SHRINK_BOUND = 1.0
"""Seconds that a step may take while a script is made shorter."""
SHRINK_TIME = 30.0
"""Seconds for making it shorter."""


class Relay:
    """tcpproxy, and both ways to the server."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._way = Way(BOUND)
        self._port = free_port()
        self._idle = 0
        command = [sys.executable, "-m", "tcp_relay.tcpproxy", LOCALHOST, str(self._way.port)]
        options = ["--listen", LOCALHOST, "--buffer", "16K", "--stall", "60"]
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*command, str(self._port), *options, "--log-level", "warning"], stderr=stderr
            )
        try:
            wait_for(self._answers, "the relay to listen")
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._way.close()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(BOUND)

    def end(self) -> int:
        """Its exit status after SIGTERM."""
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(BOUND)

    def direct(self) -> Ends:
        return self._way.dial(self._way.port)

    def relayed(self) -> Ends:
        return self._way.dial(self._port)

    def check_idle(self) -> None:
        """It has let go of all connections, and nothing surprised it."""
        wait_for(lambda: self._descriptors() <= self._idle, "the relay to close its sockets")
        assert "Traceback" not in self._log.read_text(), self._log.read_text()

    def runs(self, seed: int, script: Sequence[Step], bound: float = BOUND) -> tuple[Run, Run]:
        """The same on both ways, not yet played."""
        return Run(seed, script, self.direct, bound), Run(seed, script, self.relayed, bound)

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        try:
            ends = self.relayed()
        except OSError:
            return False
        # Both its sockets will be closed; the one that it may open in advance can still be missing.
        self._idle = self._descriptors() - 2 + 1
        for sock in ends:
            sock.close()
        return True

    def _descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    relay = Relay(tmp_path_factory.mktemp("equivalence") / "relay.log")
    try:
        yield relay
        assert relay.end() == 0
    finally:
        relay.close()


def batches() -> list[range]:
    """The seeds, by test."""
    first, dash, end = os.environ.get("KRELAY_SEED", f"0-{SEEDS}").partition("-")
    seeds = range(int(first), int(end) if dash else int(first) + 1)
    return [seeds[i : i + BATCH] for i in range(0, len(seeds), BATCH)]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", batches(), ids=lambda seeds: f"{seeds.start}-{seeds.stop}")
def test_random_scripts_look_the_same_relayed_and_direct(relay: Relay, seeds: range) -> None:
    print(f"seeds {seeds.start} to {seeds.stop - 1}")
    sessions = [relay.runs(seed, random_script(seed)) for seed in seeds]
    play(run for session in sessions for run in session)
    for session in sessions:
        if difference(*session):
            pytest.fail(told(relay, session), pytrace=False)
    relay.check_idle()


@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_a_story_reads_the_same_relayed_and_direct(relay: Relay, story: str) -> None:
    lines = [line.partition("=>") for line in story.strip().splitlines()]
    script = [parse(line) for line, _, _ in lines]
    for session in [relay.runs(seed, script) for seed in range(8)]:
        play(session)

        assert not difference(*session), printed(session)
        for run in session:
            assert len(run.rows) == len(script), "the model can't play all of it"
            for row, (_, _, answer) in zip(run.rows, lines, strict=True):
                result, *count = answer.split()
                assert (row.step, row.seen.result) == (row.step, result)
                assert not count or row.seen.least == int(count[0]), row
    relay.check_idle()


@pytest.mark.parametrize(
    "script",
    [
        ("server flood", "client abort", "server write 1"),
        ("client flood", "server flood", "client abort", "server read all", "server write 1"),
    ],
    ids=["one writer waits", "both writers wait"],
)
def test_a_relay_may_take_a_whole_flood_before_it_passes_the_reset_on(
    script: tuple[str, ...],
) -> None:
    """As one does that has to deliver something first, and comes late to it; played by hand."""
    front, back = Way(BOUND), Way(BOUND)
    client, to_client = front.dial(front.port)
    to_server, server = back.dial(back.port)
    run = Run(0, [parse(line) for line in script], lambda: (client, server), BOUND)
    taken = 0
    try:
        for _ in run.play():
            is_aborted, is_reset = client.fileno() < 0, to_server.fileno() < 0
            if is_aborted and not is_reset:
                taken += drain(to_server)[0]
                if taken >= FLOOD:
                    reset(to_server)
    finally:
        for sock in (client, to_client, to_server, server, front, back):
            sock.close()

    assert not run.failed, run.rows[-1]
    assert [str(row.step) for row in run.rows] == list(script)


def test_the_random_scripts_cover_what_can_happen() -> None:
    events: Counter[str] = Counter()
    for seed in range(SEEDS):
        model = Model()
        for step in random_script(seed):
            assert model.can(step)
            model.play(step, NOMINAL if model.may_cut(step) else None)
        events += model.events

    rare = {event: events[event] for event, least in COVERED.items() if events[event] < least}
    assert not rare, rare


def difference(direct: Run, relayed: Run) -> str:
    """What is not the same, "" if all is.  Runs that were not played to their end have none."""
    if direct.failed:
        return "the direct connection does not do what the model says"
    if relayed.failed:
        return "the relayed connection does not look like a direct one"
    if direct.was_measured or relayed.was_measured or not (direct.is_over and relayed.is_over):
        return ""
    same = [row.seen for row in direct.rows] == [row.seen for row in relayed.rows]
    return "" if same else "the answers differ, though the model allows both"


def told(relay: Relay, session: tuple[Run, Run]) -> str:
    """The failure of that script, which is made as short as it can be had."""
    seed, script = session[0].seed, session[0].script
    give_up = time.monotonic() + SHRINK_TIME
    at = 0
    while at < len(script) and time.monotonic() < give_up:
        shorter = [*script[:at], *script[at + 1 :]]
        tried = relay.runs(seed, shorter, SHRINK_BOUND)
        play(tried)
        if difference(*tried):
            script, session = shorter, tried
        else:
            at += 1
    return f"seed {seed} (KRELAY_SEED={seed}): {difference(*session)}\n\n{printed(session)}"


def printed(session: tuple[Run, Run]) -> str:
    """What the model expects of each step, and what was seen where it is another thing.

    On the one way and on the other; the model's numbers differ where they were measured.
    """
    lines = []
    for name, run in zip(("direct", "relayed"), session, strict=True):
        lines.append(f"{name}:")
        for row in run.rows:
            lines.append(f"  {row.step!s:<18} {_words(row.expected, row.expected_views)}")
            if not row.is_as_expected:
                lines.append(f"  {'    but was':<18} {_words(row.seen, row.seen_views)}")
    return "\n".join(lines)


def _words(answer: Answer, views: Views) -> str:
    amount = f"{answer.least} to {answer.most}" if answer.least < answer.most else answer.most
    words = [f"{answer.result} {amount}" if amount else answer.result]
    words += [f"{name}: {view or 'closed'}" for name, view in zip(NAMES, views, strict=True)]
    return "; ".join(words)
