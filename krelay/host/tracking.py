"""Connection tracking's timers, which other rules of this host may lean on.

krelay rewrites outside of connection tracking (ruleset.py), so it never needs it.  But a firewall
that lets answers by because their flow is tracked ends a flow for the server when tracking forgets
it: what the server says from then on is `new`, until the client speaks again.
"""

from pathlib import Path
from typing import NamedTuple

from procfs_sim.tree import Config

_SYSCTL = Path("/proc/sys/net/netfilter")


class ConntrackTimer(NamedTuple):
    """A timer that is shorter than krelay's for the same flows, in seconds."""

    proto: str
    name: str
    """Its kernel setting, below net.netfilter."""
    seconds: int
    ours: int
    setting: str
    """That of ours."""


class ConntrackTimers(NamedTuple):
    """Seconds of silence after which connection tracking forgets a flow."""

    udp: int = 300
    """One in which the two ends haven't spoken for two seconds and more."""
    udp_stream: int = 300
    tcp_established: int = 432_000

    def shorter(self, config: Config) -> list[ConntrackTimer]:
        """Those that end before krelay's."""
        found = []
        others = [s for s in config.services if s.proto == "udp" and (s.first, s.last) != (53, 53)]
        queries = config.serves("udp", 53)
        udp = [(config.timeouts_udp, "timeouts/udp")] if others else []
        udp += [(config.timeouts_udp_dns, "timeouts/udp_dns")] if queries else []
        tcp = [(config.timeouts_tcp_established, "timeouts/tcp_established")]
        for proto, name, seconds, longest in (
            ("udp", "nf_conntrack_udp_timeout", self.udp, max(udp, default=None)),
            ("udp", "nf_conntrack_udp_timeout_stream", self.udp_stream, max(udp, default=None)),
            (
                "tcp",
                "nf_conntrack_tcp_timeout_established",
                self.tcp_established,
                max(tcp) if any(s.proto == "tcp" for s in config.services) else None,
            ),
        ):
            if longest is not None and seconds < longest[0]:
                found.append(ConntrackTimer(proto, name, seconds, *longest))
        return found


def timers() -> ConntrackTimers | None:
    """Those of this network namespace; None without connection tracking.  Raises OSError."""
    if not _SYSCTL.exists():
        return None
    names = ("udp_timeout", "udp_timeout_stream", "tcp_timeout_established")
    return ConntrackTimers(*(int((_SYSCTL / f"nf_conntrack_{name}").read_text()) for name in names))


def entries() -> int:
    """How many flows are tracked now.  Raises OSError without connection tracking."""
    return int((_SYSCTL / "nf_conntrack_count").read_text())


def in_words(config: Config) -> str:
    """For `krelay status`: whether flows are tracked, and forgotten before krelay forgets them."""
    try:
        known = timers()
        if known is None or not entries():
            return "unused"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    if not (shorter := known.shorter(config)):
        return "ok"
    first = min(shorter, key=lambda timer: timer.seconds)
    return (
        f"forgets {first.proto} after {first.seconds} s, krelay after {first.ours} s "
        f"({first.setting}): rules that let answers by for it stop them then; see krelay doctor"
    )
