"""Which kernel modules must be inserted, and in which order: each after those it needs.

What a module needs stands in the file itself, as `depends=` in its .modinfo section; a package of
Debian's kernel has no modules.dep, which is only made when it is installed.

    >>> needs = {"a": ["b", "c"], "b": ["c"], "c": []}
    >>> order(["a"], needs)
    ['c', 'b', 'a']
"""

import re
from collections.abc import Iterable, Mapping, Sequence

SOFT = {"libcrc32c": ("crc32c_generic",)}
"""Needed without being named: without an implementation of CRC32C, libcrc32c does not load."""

RELAY = {
    "uml": (
        *("nfnetlink_queue", "xt_NFQUEUE", "xt_socket", "xt_multiport", "xt_addrtype", "xt_tcpudp"),
        "xt_u32",
        *("iptable_raw", "iptable_mangle", "iptable_filter", "nf_conntrack", "xt_conntrack"),
    ),
    "qemu": (
        *(
            "nfnetlink_queue",
            "nf_tables",
            "nft_queue",
            "nft_log",
            "nft_limit",
            "nfnetlink_log",
            "nft_fib_ipv4",
            "nft_fib_inet",
            "nft_tproxy",
        ),
        *("nft_socket", "nft_ct", "tcp_diag"),
        *("nft_compat", "xt_bpf", "sch_ingress", "cls_bpf"),
    ),
}
"""What a host that forwards may be asked for: iptables-legacy in the one, which has no nf_tables
for IP, and nft in the other."""

IPV6 = {"uml": ("ipv6",), "qemu": ()}
"""What a host with IPv6 addresses needs."""

QEMU_BOOT = ("virtio_pci", "virtio_net", "9pnet_virtio", "9p")
"""What Debian's kernel needs to reach its root file system and its network."""


def name(path: str) -> str:
    """The name of the module in that file.

    >>> name("/lib/modules/6.1/kernel/lib/crc-ccitt.ko")
    'crc_ccitt'
    """
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def depends(module: bytes) -> list[str]:
    """The modules that this one, the contents of a .ko file, says it needs."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    text = found[1].decode() if found else ""
    return [word.replace("-", "_") for word in text.split(",") if word]


def order(wanted: Iterable[str], needs: Mapping[str, Sequence[str]]) -> list[str]:
    """The modules to insert.  What `needs` doesn't know is built in, or not there."""
    found: list[str] = []

    def add(module: str) -> None:
        if module not in needs or module in found:
            return
        for needed in (*SOFT.get(module, ()), *needs[module]):
            add(needed)
        found.append(module)

    for module in wanted:
        add(module)
    return found
