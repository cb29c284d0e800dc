"""A netlink socket, at the kernel."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import closing

import pytest

from knet import netlink
from knet.netlink import nftables, rtnetlink, sockdiag
from knet.netlink.socket import NetlinkSocket
from krelay_vm import Lab

pytestmark = pytest.mark.net


@pytest.fixture
def relay() -> Iterator[Lab]:
    """A lab in whose relay host this thread is."""
    with Lab() as lab, lab.enter("relay"):
        yield lab


@pytest.mark.parametrize("family", [netlink.FAMILY, rtnetlink.FAMILY, sockdiag.FAMILY])
def test_each_socket_has_a_port_of_its_own(family: int) -> None:
    with closing(NetlinkSocket(family)) as one, closing(NetlinkSocket(family)) as other:
        assert 0 != one.port != other.port != 0
        assert [one.next_sequence(), one.next_sequence(), other.next_sequence()] == [1, 2, 1]


def test_a_family_that_is_not_there_is_refused() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EPROTONOSUPPORT)):
        NetlinkSocket(99)


def test_announcements_wait_until_they_are_read(relay: Lab) -> None:
    with closing(NetlinkSocket(rtnetlink.FAMILY, groups=0x1, timeout=0)) as kernel:
        assert list(kernel.waiting()) == []
        subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        assert all(kernel.waiting())
        assert list(kernel.waiting()) == []


def test_that_announcements_were_lost_is_told(relay: Lab) -> None:
    with closing(NetlinkSocket(rtnetlink.FAMILY, groups=0x1, timeout=0, buffer=1)) as kernel:
        for state in ("down", "up") * 8:
            subprocess.run(["ip", "link", "set", "lo", state], check=True)
        assert None in list(kernel.waiting())
        assert list(kernel.waiting()) == []


def test_what_is_carried_out_is_acknowledged_or_refused(relay: Lab) -> None:
    subprocess.run(["nft", "-f", "-"], input="table ip t {\n chain c {\n }\n}\n", text=True,
                   check=True)  # fmt: skip
    rule = nftables.queue_rule("t", "c", 7)
    with closing(NetlinkSocket(netlink.FAMILY, timeout=30)) as kernel:
        kernel.carry_out(nftables.joined([rule, rule]), 2)
        shown = subprocess.run(["nft", "list", "table", "ip", "t"], capture_output=True, text=True)
        assert shown.stdout.count("7") == 2
        with pytest.raises(FileNotFoundError):
            kernel.carry_out(nftables.joined([nftables.queue_rule("t", "none", 7)]), 1)
