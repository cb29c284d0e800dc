"""Packets for Wireshark: a Recorder whose bytes are a capture file (knet.wire.pcapng).

Each rewritten packet is in it twice, as it came and as it went on, and each time at the place where
it was so:

    client side    T1 before    T2 after    U1,U2 before    U3,U4 after
    inside         T1 after     T2 before   T3 before       T4 after      K:16000, K:y
    server side    T3 after     T4 before   U1,U2 after     U3,U4 before

The places are the file's interfaces, so what a reader sees of one side is what a capture on that
wire would have, and each TCP connection has both its directions there.  A comment names step and
flow, and both frames have the same packet id.  A packet that goes on as it came is there once: seen
twice it would pass for one sent twice.  A packet that wasn't rewritten is there once as well, with
its verdict and the reason, and what krelay answered behind it.
"""

from collections.abc import Callable

from knet.endpoint import Endpoint
from knet.wire import icmp, pcapng
from krelay.nat.flow import Rewrite
from krelay.steps import Hook, Step
from krelay.trace.lines import WORDS, Untouched

CLIENT, INSIDE, SERVER = 0, 1, 2
PLACES = {
    CLIENT: ("client side", "relayed packets as on the clients' wire"),
    INSIDE: ("inside", "relayed packets as the relay's own host has them"),
    SERVER: ("server side", "relayed packets as on the server's wire"),
}
WHERE = {
    Step.T1: (CLIENT, INSIDE),
    Step.T2: (INSIDE, CLIENT),
    Step.T3: (INSIDE, SERVER),
    Step.T4: (SERVER, INSIDE),
    Step.U1: (CLIENT, INSIDE),
    Step.U2: (INSIDE, SERVER),
    Step.U3: (SERVER, INSIDE),
    Step.U4: (INSIDE, CLIENT),
    Step.U12: (CLIENT, SERVER),
    Step.U34: (SERVER, CLIENT),
    Step.D1: (CLIENT, SERVER),
    Step.D2: (SERVER, CLIENT),
}
"""Where a packet of each step is before and after."""

MOST_NAMES = 4096
"""Addresses that are named; there may be a client for every packet."""
_ICMP = bytes((icmp.PROTO,))
_REMEMBERED = 4096  # rewrites whose options are kept


class Capture:
    """A Recorder.  What it gives is whole blocks, so the file can be cut behind each.

    `at` is when it begins; the texts tell on what and for what it was made.  `is_own` tells
    addresses of this host, whose own ICMP errors were on no wire before.
    """

    def __init__(
        self,
        at: int,
        *,
        hardware: str = "",
        os: str = "",
        asked: str = "",
        is_own: Callable[[bytes], bool] = lambda _: False,
    ) -> None:
        self._about = (hardware, os, asked)
        self._is_own = is_own
        self._began = at
        self._packets = 0
        self._seen = [0] * len(PLACES)
        self._lost = [0] * len(PLACES)
        self._untold = [0] * len(PLACES)  # of the lost: not told of yet
        self._options: dict[Rewrite, tuple[bytes, bytes]] = {}
        self._names: dict[bytes, str] = {}
        self._roles = {"relay": 0, "server": 0, "client": 0}

    def begin(self) -> bytes:
        """The section and its interfaces."""
        hardware, os, asked = self._about
        blocks = [pcapng.section(hardware=hardware, os=os, application="krelay", comment=asked)]
        for name, text in PLACES.values():
            blocks.append(pcapng.interface(name, link=pcapng.RAW_IP, description=text))
        return b"".join(blocks)

    def rewritten(self, rewrite: Rewrite, before: bytes, after: bytes, at: int) -> bytes:
        """Its two frames, or the one if nothing has changed; new names before them."""
        came, went = WHERE[rewrite.step]
        known = self._options.get(rewrite)
        named = b""
        if known is None:
            named = self._new_names(rewrite)
            known = self._options_of(rewrite)
        self._packets += 1
        if before[9:10] == _ICMP and self._is_own(before[12:16]):
            comment = f"{rewrite.step.label} before flow {rewrite.flow.id}"
            came, known = INSIDE, (pcapng.options(None, comment), known[1])
        if before == after:
            comment = f"{rewrite.step.label} unchanged flow {rewrite.flow.id}"
            place, outbound = (came, False) if went == INSIDE else (went, True)  # on a wire
            return named + self._frame(place, after, at, pcapng.options(outbound, comment))
        return (
            named + self._frame(came, before, at, known[0]) + self._frame(went, after, at, known[1])
        )

    def untouched(self, what: Untouched, at: int) -> bytes:
        """Its frame, and those of the answers."""
        place = _place(what)
        self._packets += 1
        comment = f"{WORDS[what.verdict]} {what.reason}"
        inbound = None if place == INSIDE else False
        frames = self._frame(place, what.packet, at, pcapng.options(inbound, comment))
        for answer in what.answers:
            self._packets += 1
            outbound = None if place == INSIDE else True
            options = pcapng.options(outbound, f"answer to {comment}")
            frames += self._frame(place, answer, at, options)
        return frames

    def missed(self, what: Rewrite | Untouched) -> None:
        """It counts as lost where it would have been seen."""
        if isinstance(what, Untouched):
            places = [_place(what)]
        else:
            places = [at for at in WHERE[what.step] if at != INSIDE or what.old != what.new]
        for place in places:
            self._seen[place] += 1
            self._lost[place] += 1
            self._untold[place] += 1

    def caught_up(self) -> bytes:
        """Nothing: losses stand in the next packet, and at the end."""
        return b""

    def end(self, at: int) -> bytes:
        """The statistics of each place."""
        return b"".join(
            pcapng.statistics(
                place,
                at,
                began=self._began,
                received=self._seen[place],
                dropped=self._lost[place],
            )
            for place in PLACES
        )

    def _frame(self, place: int, data: bytes, at: int, options: bytes) -> bytes:
        self._seen[place] += 1
        options += pcapng.packet_id(self._packets)
        if self._untold[place]:
            options += pcapng.lost_before(self._untold[place], "the reader is too slow")
            self._untold[place] = 0
        return pcapng.packet(place, data, at, options)

    def _options_of(self, rewrite: Rewrite) -> tuple[bytes, bytes]:
        """Of its packets before and after: made once, as they are the same for each packet."""
        if len(self._options) >= _REMEMBERED:
            self._options.clear()
        label, flow = rewrite.step.label, rewrite.flow.id
        came, went = WHERE[rewrite.step]
        found = (
            pcapng.options(None if came == INSIDE else False, f"{label} before flow {flow}"),
            pcapng.options(None if went == INSIDE else True, f"{label} after flow {flow}"),
        )
        self._options[rewrite] = found
        return found

    def _new_names(self, rewrite: Rewrite) -> bytes:
        """The block that names what is new of this flow: `client`, the next one `client-2`."""
        flow = rewrite.flow
        relays: list[Endpoint] = [] if flow.service == flow.server else [flow.service]
        relays += [flow.relay] if flow.relay else []
        new: dict[bytes, str] = {}
        for role, ends in (("relay", relays), ("server", [flow.server]), ("client", [flow.client])):
            for end in ends:
                if end.addr in self._names or len(self._names) >= MOST_NAMES:
                    continue
                self._roles[role] += 1
                number = self._roles[role]
                new[end.addr] = role if number == 1 else f"{role}-{number}"
                self._names[end.addr] = new[end.addr]
        return pcapng.names(new)


def _place(what: Untouched) -> int:
    if what.hook != Hook.PREROUTING:
        return INSIDE
    return SERVER if what.from_server else CLIENT
