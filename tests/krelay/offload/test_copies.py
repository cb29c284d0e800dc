"""The packet log against the real kernel: copies of both hooks, losses told, a group given back."""

import errno
import select
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest

from knet.netlink import nflog
from knet.netlink.nflog import Copy
from krelay.offload import copies
from krelay.offload.copies import Copies
from krelay_vm import Lab

pytestmark = pytest.mark.net

GROUP, OTHER = 7, 8
PORT = 5000
PREROUTING, POSTROUTING = 0, 4
RULES = f"""
table ip krelay-test {{
  chain prerouting {{
    type filter hook prerouting priority raw;
    udp dport {PORT} log group {GROUP} snaplen 28
  }}
  chain postrouting {{
    type filter hook postrouting priority srcnat;
    udp dport {PORT} log group {GROUP} snaplen 28
  }}
}}
"""


class Ends:
    """A sender on the client host; whoever is written to, packets come through the relay."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.server, self.relay = lab.address("server"), lab.address("relay", "client")
        with lab.enter("client"):
            self.sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sender.bind((lab.address("client"), 4000))

    def send(self, to: str, *contents: bytes) -> None:
        for content in contents:
            self.sender.sendto(content, (to, PORT))

    def copies(
        self,
        group: int = GROUP,
        buffer: int = copies.SOCKET_BUFFER,
        together: int = nflog.TOGETHER,
    ) -> Copies:
        with self.lab.enter("relay"):
            return Copies(group, buffer=buffer, together=together)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with Lab() as lab:
        lab.run("relay", "nft", "-f", "-", input=RULES)
        ends = Ends(lab)
        with closing(ends.sender):
            yield ends


def read(copies: Copies, count: int) -> list[Copy]:
    """So many, as they come, and none after them."""
    found: list[Copy] = []
    while len(found) < count:
        assert select.select([copies], [], [], 5)[0]
        found += copies.read(1000)
    assert copies.read(1000) == []
    return found


def told(copy: Copy) -> tuple[int, str, str, int, int, int]:
    """Hook, addresses, ports and the length of the content."""
    hook, head = copy
    assert (len(head), head[0], head[9]) == (28, 0x45, socket.IPPROTO_UDP)
    source, target = (socket.inet_ntoa(head[at : at + 4]) for at in (12, 16))
    sport, dport, length = (int.from_bytes(head[at : at + 2]) for at in (20, 22, 24))
    return hook, source, target, sport, dport, length - 8


def test_a_packet_is_copied_at_each_hook_in_its_order(ends: Ends) -> None:
    with closing(ends.copies()) as copies:
        for size in range(150):
            ends.send(ends.server, bytes(size))
        client = ends.lab.address("client")

        assert [told(copy) for copy in read(copies, 300)] == [
            (hook, client, ends.server, 4000, PORT, size)
            for size in range(150)
            for hook in (PREROUTING, POSTROUTING)
        ]
        assert copies.lost == 0


def test_usual_copies_are_read_without_their_attributes(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(ends.copies()) as copies:
        ends.send(ends.server, b"one")
        read(copies, 2)
        monkeypatch.setattr(nflog, "read", lambda message: None)
        ends.send(ends.relay, *[b"delivered"] * 100)  # one hook alone
        read(copies, 100)
        ends.send(ends.server, *[b"forwarded"] * 100)
        read(copies, 200)


def test_about_as_many_are_read_as_are_asked_for_and_the_rest_waits(ends: Ends) -> None:
    with closing(ends.copies()) as copies:
        ends.send(ends.server, *[b"x"] * 500)
        select.select([copies], [], [], 5)

        assert 1 <= len(copies.read(1)) <= nflog.TOGETHER
        select.select([copies], [], [], 5)
        assert 150 <= len(copies.read(150)) <= 150 + nflog.TOGETHER
        assert select.select([copies], [], [], 0)[0]


@pytest.mark.parametrize("together", [1, 3])
def test_as_many_copies_come_together_as_was_asked_for(ends: Ends, together: int) -> None:
    with closing(ends.copies(together=together)) as copies:
        ends.send(ends.relay, *[b"x"] * 6)
        for _ in range(6 // together):
            assert select.select([copies], [], [], 5)[0]
            assert len(copies.read(1)) == together


def test_a_single_copy_comes_within_some_milliseconds(ends: Ends) -> None:
    with closing(ends.copies()) as copies:
        ends.send(ends.relay, b"x")

        assert select.select([copies], [], [], 0.5)[0]  # the kernel's own wont is a second
        assert len(copies.read(10)) == 1


def test_packets_with_options_and_their_like_are_none_of_ours(ends: Ends) -> None:
    with closing(ends.copies()) as copies:
        ends.sender.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"\x01\x01\x01\x00")
        ends.send(ends.relay, b"with options")
        ends.sender.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, b"")
        ends.send(ends.relay, b"plain")

        assert [told(copy)[-1] for copy in read(copies, 1)] == [5]


def test_what_the_buffer_could_not_hold_is_told_and_reading_goes_on(ends: Ends) -> None:
    with closing(ends.copies(buffer=20_000)) as copies:
        ends.send(ends.relay, *[b"x"] * 2000)
        got = []
        while select.select([copies], [], [], 0.2)[0]:
            got += copies.read(1000)

        assert copies.lost > 0
        assert 0 < len(got) < 2000
        ends.send(ends.relay, b"after")
        assert told(read(copies, 1)[0])[-1] == 5


def test_a_group_that_is_taken_is_refused_and_others_are_not(ends: Ends) -> None:
    with closing(ends.copies()) as copies:
        with pytest.raises(OSError, match="another program") as refused:
            ends.copies()
        ends.copies(OTHER).close()

        assert refused.value.errno == errno.EBUSY
        ends.send(ends.relay, b"x")
        assert len(read(copies, 1)) == 1


def test_closing_gives_the_group_up(ends: Ends) -> None:
    first = ends.copies()
    ends.send(ends.relay, b"nobody reads this")
    first.close()
    first.close()

    with closing(ends.copies()) as second:
        ends.send(ends.relay, b"x")
        assert [told(copy)[-1] for copy in read(second, 1)] == [1]


def test_a_kernel_that_refuses_is_told_as_an_error(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nflog, "SUBSYSTEM", 15)  # nobody's

    with pytest.raises(OSError, match="Invalid argument") as refused:
        ends.copies()
    assert refused.value.errno == errno.EINVAL
