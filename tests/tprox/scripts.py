"""The ten phases, played by both ends at once.

Each takes a stage with nothing on it, and raises Failure.  Numbers of bytes are chosen to fill what
the kernel holds by itself (some megabytes on loopback) where a proxy's own store is to be seen.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import count

from tests.net.programs.server import blob
from tests.tprox.ends import End, Ending, Failure, Text, must
from tests.tprox.field import Stage, small_buffers

BULK = 2_000_000
PROMPT = 3.0
"""Seconds for an echo beside blocked connections: only who waits for them takes that long."""
STILL = 1.0
"""Seconds without a byte taken: then a flood is stuck."""
THINK = 1.0
"""Seconds that an answer lets wait for itself."""


def single_echo(stage: Stage) -> None:
    """Messages of several sizes come back, then the end of file."""
    _converse(stage, 1)


def two_echoes(stage: Stage) -> None:
    """Each connection gets its own back."""
    _converse(stage, 2)


def twenty_echoes(stage: Stage) -> None:
    """Twenty at once."""
    _converse(stage, 20)


def _converse(stage: Stage, connections: int) -> None:
    pairs = [stage.pair() for _ in range(connections)]
    calls: list[Callable[[], None]] = []
    for number, (client, server) in enumerate(pairs):
        calls += partial(_talk, client, number), server.echo
    stage.together(*calls)


def _talk(end: End, seed: int) -> None:
    for size in (1, 10, 1000, 20_000, 1):
        _ask(end, b"".join(blob(seed, size)))
    end.shut()
    end.receive_text(seed, 0)


def _ask(end: End, message: bytes) -> None:
    end.send(message)
    if end.receive(len(message)) != message:
        raise Failure(f"{end.who}: something else came back")


def bulk(stage: Stage) -> None:
    """20 connections carry 2 MB each way, at once; each byte is checked."""
    calls: list[Callable[[], None]] = []
    for number in range(20):
        client, server = stage.pair()
        up, down = 2 * number, 2 * number + 1
        calls += partial(_send_all, client, up), partial(server.receive_text, up, BULK)
        calls += partial(_send_all, server, down), partial(client.receive_text, down, BULK)
    stage.together(*calls)


def _send_all(end: End, seed: int) -> None:
    end.send_text(seed, BULK)
    end.shut()


def blocked_and_normal(stage: Stage) -> None:
    """Floods that nobody reads get stuck; echoes beside them, old and new, stay prompt."""
    before = [stage.pair() for _ in range(3)]
    floods = [partial(_get_stuck, stage, *_turned(stage.pair(), turn)) for turn in (0, 1) * 3]
    over = threading.Event()

    def flood() -> None:
        try:
            stage.together(*floods)
        finally:
            over.set()

    def echoes() -> None:
        new = [stage.pair() for _ in range(3)]
        calls: list[Callable[[], None]] = []
        for client, server in before + new:
            calls += partial(_stay_prompt, client, over), server.echo
        stage.together(*calls)

    stage.together(flood, echoes)


def _get_stuck(stage: Stage, end: End, _deaf: End) -> None:
    small_buffers(end)
    began = time.monotonic()
    seen = end.flood(1, still=STILL)
    # A proxy with a short limit may be quicker than this phase.
    if seen and time.monotonic() - began < 0.8 * stage.stall:
        raise Failure(f"{end.who}: {seen.value} after {end.sent:,} bytes that nobody read")


def _stay_prompt(end: End, over: threading.Event) -> None:
    for turn in count():
        end.give(PROMPT)
        try:
            _ask(end, b"".join(blob(turn, 100)))
        except Failure as failure:
            raise Failure(f"{failure}, beside connections that are blocked") from None
        if over.wait(0.02):
            break
    end.shut()
    end.receive_text(0, 0)


def one_way_shutdown(stage: Stage) -> None:
    """Whoever ends its sending still gets a long answer; both ways round."""
    calls: list[Callable[[], None]] = []
    for turn in (0, 1):
        asking, answering = _turned(stage.pair(), turn)
        calls += partial(_ask_and_shut, asking), partial(_think_and_answer, answering)
    stage.together(*calls)


def _ask_and_shut(end: End) -> None:
    end.send_text(1, 100_000)
    end.shut()
    end.receive_text(2, 200_000)
    end.close()


def _think_and_answer(end: End) -> None:
    end.receive_text(1, 100_000)
    time.sleep(THINK)
    answer = b"".join(blob(2, 200_000))
    for at in range(0, len(answer), 10_000):
        end.send(answer[at : at + 10_000])
        time.sleep(0.05)
    end.close()


def early_close(stage: Stage) -> None:
    """What one side does in a hurry, the other sees for what it was; others go on."""
    calls = [
        partial(_close_early, name, *_turned(stage.pair(), turn))
        for name in EARLY_CLOSES
        for turn in (0, 1)
    ]
    stage.together(*calls)
    _converse(stage, 1)


def _close_early(name: str, leaving: End, staying: End) -> None:
    try:
        EARLY_CLOSES[name](leaving, staying)
    except Failure as failure:
        raise Failure(f"{failure}; the other end {name}") from None


def _full_then_fin(leaving: End, staying: End) -> None:
    """The other reads late and slowly: the proxy gets the FIN when it still holds a lot."""
    leaving.flood(3, still=0.4)
    leaving.close()
    text = Text(3, leaving.sent)
    staying.receive_slowly(text, rate=leaving.sent, seconds=0.9)
    must(staying, staying.receive_rest(text), Ending.FIN)
    if text.got < leaving.sent:
        raise Failure(
            f"{staying.who}: end of file when {text.got:,} of {leaving.sent:,} bytes came"
        )


def _quiet_reset(leaving: End, staying: End) -> None:
    leaving.send(b"hello")
    staying.receive(5)
    leaving.reset()
    must(staying, staying.receive_rest(Text(0, 0)), Ending.RST)


def _busy_reset(leaving: End, staying: End) -> None:
    """The last bytes may be lost to a RST, no others may come."""
    leaving.flood(4, still=0.4)
    leaving.reset()
    must(staying, staying.receive_rest(Text(4, leaving.sent)), Ending.RST)


def _unread_close(leaving: End, staying: End) -> None:
    """To close with bytes unread sends a RST (RFC 2525, 2.17)."""
    staying.flood(5, still=0.4)
    leaving.close()
    staying.give(5)
    must(staying, staying.flood(5), Ending.RST)


def _leaves_after_request(leaving: End, staying: End) -> None:
    leaving.send_text(6, 1000)
    leaving.close()
    staying.receive_text(6, 1000)
    staying.give(5)
    staying.flood(7)


EARLY_CLOSES = {
    "had sent all it could, and then closed": _full_then_fin,
    "reset the connection when nothing was under way": _quiet_reset,
    "reset the connection when bytes were under way": _busy_reset,
    "closed with bytes unread": _unread_close,
    "closed after its request": _leaves_after_request,
}


def active_is_not_cut(stage: Stage) -> None:
    """Slow readers and silent connections outlive the stall limit."""
    calls: list[Callable[[], None]] = []
    seconds = 1.5 * stage.stall
    for turn in (0, 1):
        sending, reading = _turned(stage.pair(), turn)
        calls.append(partial(_read_slowly, stage, sending, reading, seconds))
    client, server = stage.pair()
    calls += partial(_be_silent, client, seconds), server.echo
    stage.together(*calls)


def _read_slowly(stage: Stage, sending: End, reading: End, seconds: float) -> None:
    # A full socket is writable again when a third of it is free (sk_stream_is_writeable), of up to
    # 4 MB: that much must be read within the limit for any proxy to see progress, and is thrice.
    rate = 4e6 / stage.stall
    small_buffers(sending), small_buffers(reading)
    done = threading.Event()
    text = Text(8, 1 << 40)

    def send() -> None:
        if seen := sending.flood(8, stop=done, read=lambda: text.got):
            raise Failure(f"{sending.who}: {seen.value}, though the other end reads steadily")
        sending.shut()

    def read() -> None:
        try:
            reading.receive_slowly(text, rate, seconds)
        finally:
            done.set()
        must(reading, reading.receive_rest(text), Ending.FIN)

    stage.together(send, read)
    if text.got != sending.sent:
        raise Failure(f"{reading.who}: {text.got:,} of {sending.sent:,} bytes came")


def _be_silent(end: End, seconds: float) -> None:
    _ask(end, b"before")
    end.receive_nothing(seconds)
    _ask(end, b"after")
    end.shut()
    end.receive_text(0, 0)


def lazy_forward(stage: Stage) -> None:
    """The client sends, the server never reads: after the stall limit both get a RST."""
    client, server = stage.pair()
    _be_lazy(stage, client, server)


def lazy_reverse(stage: Stage) -> None:
    """The server sends, the client never reads: after the stall limit both get a RST."""
    client, server = stage.pair()
    _be_lazy(stage, server, client)


def _be_lazy(stage: Stage, sending: End, lazy: End) -> None:
    # A proxy counts from its last progress, which is after the beginning and before the sender's.
    earliest, latest = 0.8 * stage.stall, 2 * stage.stall + 2
    small_buffers(sending)
    began = time.monotonic()

    def send() -> None:
        seen = sending.flood(9, still=STILL / 2)
        sending.give(latest)
        must(sending, seen or sending.flood(9), Ending.RST)
        _not_early(sending)

    def stare() -> None:
        lazy.give(latest + stage.stall)
        must(lazy, lazy.over(), Ending.RST)
        _not_early(lazy)

    def _not_early(end: End) -> None:
        if (after := time.monotonic() - began) < earliest:
            raise Failure(
                f"{end.who}: a reset after {after:.1f} s, too early for a stall limit of "
                f"{stage.stall:g} s"
            )

    stage.together(send, stare)
    _converse(stage, 1)


def _turned(pair: tuple[End, End], turn: int) -> tuple[End, End]:
    client, server = pair
    return (server, client) if turn else (client, server)


SCRIPTS: dict[str, Callable[[Stage], None]] = {
    "Single echo connection": single_echo,
    "Two echo connections": two_echoes,
    "20 echo connections": twenty_echoes,
    "Bulk data, 20 connections": bulk,
    "Mix of blocked and normal": blocked_and_normal,
    "One-way shutdown": one_way_shutdown,
    "Early close": early_close,
    "Non-timeout of active client": active_is_not_cut,
    "Timeout of lazy forward client": lazy_forward,
    "Timeout of lazy reverse client": lazy_reverse,
}
"""By the names of `plan.PHASES`."""
