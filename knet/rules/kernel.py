"""What nf_tables is asked, or told, by netlink: a run of nft takes some hundred times as long."""

import errno

from knet import netlink
from knet.netlink import nftables
from knet.netlink.socket import NetlinkSocket
from knet.rules.run import TIMEOUT


def transaction(*requests: bytes) -> None:
    """Has the kernel carry these out together.  Raises OSError."""
    _carry_out(nftables.joined(requests), len(requests))


def has_chain(table: str, chain: str) -> bool | None:
    """Whether this chain for IPv4 is there; None if the kernel doesn't tell: ask the tool."""
    try:
        _carry_out(nftables.get_chain(table, chain), 1)
    except OSError as error:
        return False if error.errno == errno.ENOENT else None
    return True


def has_queue(table: str) -> bool:
    """Whether nf_tables has a `queue` of its own, or the kernel doesn't tell.

    It is tried in a table of this name, of which nothing stays.
    """
    try:
        transaction(*nftables.own_queue(table))
    except OSError as error:
        return error.errno != errno.ENOENT
    return True


def _carry_out(requests: bytes, count: int) -> None:
    with NetlinkSocket(netlink.FAMILY, timeout=TIMEOUT) as kernel:
        kernel.carry_out(requests, count)
