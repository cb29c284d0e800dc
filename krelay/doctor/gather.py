"""Finds the facts out: /proc, the routing socket, nft and iptables, the file tree.

Each part is looked at by itself, and one that can't be is a line in the facts' problems.  Nothing
is sent and nothing changed (probe sends; that is a part of its own).
"""

import errno
import importlib
import ipaddress
import itertools
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

from knet import children, listeners, localports, trust
from knet.rules.run import RulesUnavailable
from knet.sockbuf import Direction
from krelay.control import client as control
from krelay.doctor import iptrules, nftrules
from krelay.doctor.facts import LOOPBACK, Facts, Leftover, LinkFacts, ListenerFacts, Path, Uplink
from krelay.doctor.firewall import Chain, Chains, Rule
from krelay.host import netfilter, processes, tracking, treelock
from krelay.host.cleanup import SOCKETS
from krelay.rules.spec import DEFAULT_QUEUE, instance_of, queue_of
from procfs_sim import ondisk
from procfs_sim.ondisk import FileTree
from procfs_sim.tree import SETTINGS, Config, SettingRefused, conflicts, parse

PACKAGES = ("netfilterqueue", "pyroute2", "rich", "inotify_simple")
TOOLS = ("ufw", "firewall-cmd")
CAP_NET_ADMIN, CAP_NET_RAW = 12, 13  # linux/capability.h
NUD_FAILED = 0x20  # linux/neighbour.h
FAR_AWAY = IPv4Address("192.88.99.1")
"""Anybody: an address that nobody has a route of its own to (RFC 7526)."""
OWN_TABLES = (253, 254, 255)
"""Those that each host has: default, main, local (linux/rtnetlink.h)."""
UDP_GRO = ("rx-udp-gro-forwarding", "rx-gro-list")
TIMEOUT = 10.0
"""Seconds for one run of nft or iptables-save."""

_SYS = FilePath("/proc/sys/net")
_NET = FilePath("/proc/thread-self/net")
_QUEUES = _NET / "netfilter/nfnetlink_queue"


CHEAP = frozenset({"privileges", "file tree", "krelay", "queue", "rules", "listeners"})
"""Parts that cost no run of a program and are seen within milliseconds."""


def gather(
    root: FilePath,
    client: IPv4Address | None = None,
    queue_num: int = DEFAULT_QUEUE,
    asked: Mapping[str, Any] = MappingProxyType({}),
    *,
    cheap: bool = False,
) -> Facts:
    """The facts about this host.  Never raises for anything the host may be like.

    `asked`: values of settings (by file) that are to be checked instead of those in the tree.
    `cheap`: only CHEAP parts.
    """
    gatherer = _Gatherer(root, client, queue_num, asked)
    gatherer.run(cheap=cheap)
    return gatherer.facts


class _Gatherer:
    """The facts so far; each part adds some."""

    def __init__(
        self,
        root: FilePath,
        client: IPv4Address | None,
        queue_num: int,
        asked: Mapping[str, Any],
    ) -> None:
        instance = netfilter.instance(root)
        self.facts = Facts(root=str(root), instance=instance, queue_num=queue_num)
        self.problems: list[tuple[str, str]] = []
        self._root = root
        self._client = client
        self._asked = asked
        self._cheap = False
        self._in_force = 0
        """The gateway port that a running krelay has; 0: there is none."""

    def run(self, *, cheap: bool) -> None:
        """Every part; one that fails is told."""
        self._cheap = cheap
        for what, part in (
            ("privileges", self._privileges),
            ("packages", self._packages),
            ("file tree", self._tree),
            ("krelay", self._daemon),
            ("queue", self._queue),
            ("rules", self._rules),
            ("links", self._links),
            ("routes", self._routes),
            ("uplinks", self._uplinks),
            ("kernel settings", self._settings),
            ("listeners", self._listeners),
            ("firewall", self._firewall),
            ("UDP GRO", self._gro),
        ):
            if cheap and what not in CHEAP:
                self._unseen(what, "left out")
                continue
            try:
                part()
            except Exception as error:  # whatever it is, the other parts are worth a look
                reason = _reason(error)
                self.problems.append((what, reason))
                self._unseen(what, f"can't be looked at: {reason}")
        self._add(problems=tuple(self.problems))

    def _unseen(self, part: str, reason: str) -> None:
        self._add(unseen=(*self.facts.unseen, (part, reason)))

    def _add(self, **found: Any) -> None:
        self.facts = replace(self.facts, **found)

    def _privileges(self) -> None:
        status = FilePath("/proc/thread-self/status").read_text()
        (held,) = (
            int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")
        )
        self._add(
            uid=os.geteuid(),
            net_admin=bool(held >> CAP_NET_ADMIN & 1),
            net_raw=bool(held >> CAP_NET_RAW & 1),
            tools=frozenset(tool for tool in TOOLS if shutil.which(tool)),
            files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        )

    def _packages(self) -> None:
        missing = []
        for name in PACKAGES:
            try:
                importlib.import_module(name)
            except ImportError:
                missing.append(name)
        self._add(missing_packages=tuple(missing))

    def _tree(self) -> None:
        tree = FileTree(self._root)
        values = {}
        for name, setting in SETTINGS.items():
            if (text := tree.read(name)) is None:
                continue
            try:
                values[setting.field] = parse(name, text)
            except SettingRefused as refused:
                self.problems.append((name, f"{refused}; its default is checked"))
        self._in_force = Config(**values).gport
        values |= {SETTINGS[name].field: value for name, value in self._asked.items()}
        config = replace(Config(), **values)
        served = treelock.is_served(self._root)
        try:
            ondisk.check(self._root)
        except trust.Untrusted as untrusted:
            self._add(tree_fault=untrusted.what, tree_mend=untrusted.mend)
        self._add(
            config=config,
            conflict=next(
                (f"{name}: {reason}" for name, reason in conflicts(config, ("gport",)).items()), ""
            ),
            tree_exists=self._root.is_dir(),
            served=served,
            stale_sockets=not served and any((self._root / name).exists() for name in SOCKETS),
        )

    def _daemon(self) -> None:
        if not self.facts.served:
            return
        status = control.ask_json(self._root, "show status json")[0]
        same_port = self.facts.config.gport == self._in_force
        self._add(
            state=str(status["state"]),
            tcp_relays=int(status["tcp_relays"]),
            tree_state=str(status.get("tree", "ok")),
            gateway=str(status.get("gateway_port", "")) if same_port else "",
            other_ports=tuple(int(each.partition("/")[2]) for each in status.get("other_port", {})),
            queue_num=int(status["queue"]),
        )

    def _queue(self) -> None:
        if not _QUEUES.exists():  # a module is loaded when the queue is first asked for
            self._add(has_queue=_is_module("nfnetlink_queue"))
            return
        from krelay.datapath.nfqueue import figures, figures_shown

        if not figures_shown():
            self._unseen("queue", "who serves which queue is shown to root and its group alone")
            return
        found = figures(self.facts.queue_num)
        if found is None:
            return
        if self.facts.served and self.facts.state == "running":
            self._add(queue_lost=(found.queue_dropped, found.socket_dropped))
        else:
            self._add(queue_taken=True)

    def _rules(self) -> None:
        self._add(backend=None)
        if not self.facts.net_admin:
            self._unseen("rules", "CAP_NET_ADMIN is wanting, which it takes to make rules")
            return
        if self.facts.served:
            status = control.ask_json(self._root, "show status json")[0]
            if status["state"] == "running" or (self._cheap and status["rules"] != "none"):
                self._add(backend=status["rules"], datapath=status["datapath"])
                return
        if self._cheap:
            self._unseen("rules", "left out")
            return
        try:
            backend = netfilter.probe()
            datapath = "kernel" if backend.has_maps else f"queue ({netfilter.NO_MAPS})"
            self._add(backend=backend.name, datapath=datapath)
        except RulesUnavailable as error:
            self._add(backend_problem=str(error))

    def _links(self) -> None:
        from pyroute2 import IPRoute

        with IPRoute() as ip:
            found = ip.get_links()
            up = [
                message.get_attr("IFLA_IFNAME")
                for message in found
                if message["flags"] & 1 and not _is_vrf(message)  # IFF_UP (linux/if.h)
            ]
            own = {
                IPv4Address(address)
                for message in ip.get_addr(family=socket.AF_INET)
                if (address := message.get_attr("IFA_LOCAL") or message.get_attr("IFA_ADDRESS"))
            }
        vrfs = _vrfs(found)
        links = [
            LinkFacts(
                name,
                rp_filter=_number(_SYS / "ipv4/conf" / name / "rp_filter"),
                forwards=bool(_number(_SYS / "ipv4/conf" / name / "forwarding")),
                send_redirects=any(
                    _number(_SYS / "ipv4/conf" / each / "send_redirects") for each in ("all", name)
                ),
                vrf=vrfs.get(name, ""),
            )
            for name in up
            if name != LOOPBACK
        ]
        self._add(links=tuple(links), own=frozenset(a for a in own if not a.is_loopback))

    def _routes(self) -> None:
        from pyroute2 import IPRoute

        config = self.facts.config
        with IPRoute() as ip:
            names = {m["index"]: m.get_attr("IFLA_IFNAME") for m in ip.get_links()}
            silent = {
                (m["ifindex"], m.get_attr("NDA_DST"))
                for m in ip.get_neighbours(family=socket.AF_INET)
                if m["state"] & NUD_FAILED
            }
            server = _path(ip, config.real_ip, names, silent)
            client = _path(ip, self._client, names, silent) if self._client else None
            beside = False
            if self._client and server.link:
                nets = [
                    ipaddress.IPv4Network(
                        f"{m.get_attr('IFA_ADDRESS')}/{m['prefixlen']}", strict=False
                    )
                    for m in ip.get_addr(family=socket.AF_INET)
                    if names.get(m["index"]) == server.link
                ]
                beside = any(self._client in net for net in nets) and any(
                    config.real_ip in net for net in nets
                )
            default = _path(ip, FAR_AWAY, names, silent)
        self._add(server=server, client=client, beside=beside, default_link=default.link)

    def _uplinks(self) -> None:
        """Where rules have other routes for what this host sends from one of its addresses."""
        from pyroute2 import IPRoute

        server, link = self.facts.config.real_ip, self.facts.server and self.facts.server.link
        if link is None:
            return
        client = self._client or FAR_AWAY
        with IPRoute() as ip:
            names = {m["index"]: m.get_attr("IFLA_IFNAME") for m in ip.get_links()}
            indices = {name: index for index, name in names.items()}
            rules = ip.get_rules(family=socket.AF_INET)
            if not any(rule["src_len"] for rule in rules):
                return
            places = {
                IPv4Address(message.get_attr("IFA_LOCAL")): names[message["index"]]
                for message in ip.get_addr(family=socket.AF_INET)
            }
            relayed = _path(ip, client, names, set(), src=str(server), iif=indices[link])
            known = {rule.get_attr("FRA_FWMARK") for rule in rules}
            found = {}
            for rule in rules:
                table = _table(rule)
                if not rule["src_len"] or table in OWN_TABLES:
                    continue
                net = ipaddress.IPv4Network(
                    f"{rule.get_attr('FRA_SRC')}/{rule['src_len']}", strict=False
                )
                for address in places.keys() & self.facts.own:
                    if address in net and address not in found:
                        own = _path(ip, client, names, set(), src=str(address))
                        marks = (r.get_attr("FRA_FWMARK") for r in rules if _table(r) == table)
                        mark = next((each for each in marks if each), None)
                        free = next(n for n in itertools.count(table) if n not in known)
                        found[address] = Uplink(
                            address, places[address], table, own, relayed, mark, free
                        )
        self._add(uplinks=tuple(found[address] for address in sorted(found)))

    def _settings(self) -> None:
        ipv4 = _SYS / "ipv4"
        low, high = map(int, (ipv4 / "ip_local_port_range").read_text().split())
        rmem = _SYS / "core/rmem_max"  # not there in a network namespace of older kernels
        self._add(
            forwards=bool(_number(ipv4 / "ip_forward")),
            rp_filter_all=_number(ipv4 / "conf/all/rp_filter"),
            rp_filtered=_netstat("IPReversePathFilter"),
            rmem_max=_number(rmem) if rmem.exists() else None,
            buffer_is_granted=_may_enlarge(),
            tracked=_tracked(),
            timers=tracking.timers(),
            port_range=(low, high),
            reserved_ports=localports.reserved(FilePath(localports.RESERVED).read_text()),
        )

    def _listeners(self) -> None:
        config = self.facts.config
        found = []
        for proto, address, port, inode in _sockets():
            is_gateway = proto == "tcp" and port == config.gport
            if not (config.serves(proto, port) or is_gateway):
                continue
            if is_gateway and self.facts.gateway == "served":
                continue  # tcp-relay's, and krelay's, which holds it
            who = listeners.holder([inode])
            process = processes.look(who.pid) if who else None
            if process is not None and self._is_our_tcp_relay(process):
                continue
            if who is None and is_gateway and self.facts.uid != 0:
                what = f"who listens on port {port} is shown to root alone"
                self._unseen("gateway port", what)
                continue
            name, pid = (who.name, who.pid) if who else ("another program", None)
            found.append(ListenerFacts(proto, address, port, name, pid, _unit(pid) if pid else ""))
        self._add(listeners=tuple(sorted(found, key=lambda one: (one.proto, one.port))))

    def _is_our_tcp_relay(self, process: processes.RunningProgram) -> bool:
        ours = processes.program(process.arguments)
        return ours is not None and ours.name == processes.TCP_RELAY and process.serves(self._root)

    def _firewall(self) -> None:
        if not self.facts.net_admin:
            self._unseen("firewall", "CAP_NET_ADMIN is wanting, which it takes to read rules")
            return
        chains, leftovers = self._nft()
        for tool in self._iptables_tools():
            text = _run(f"{tool}-save")
            found = iptrules.chains(text, tool)
            leftovers += _instances(tool, found)
            chains += tuple(
                replace(chain, rules=tuple(r for r in chain.rules if not _leads_to_ours(r)))
                for chain in found
                if not instance_of(chain.name)
            )
        from krelay.datapath.nfqueue import figures, figures_shown

        dead = []
        for left in leftovers:
            ours = left.name == self.facts.instance
            if (ours and not self.facts.served) or (
                not ours
                and left.queue is not None
                and figures_shown()
                and figures(left.queue) is None
            ):
                dead.append(left)
        self._add(chains=chains, leftovers=tuple(dead))

    def _nft(self) -> tuple[Chains, list[Leftover]]:
        self._made_by_iptables: frozenset[str] = frozenset()
        if not shutil.which("nft"):
            self._unseen("firewall", "nft isn't installed, so rules made by it can't be read")
            return (), []
        listing, text = _listed()
        self._made_by_iptables = nftrules.made_by_iptables(listing)
        found = nftrules.chains(listing, text)
        ours = [c for c in found if c.family == "ip" and instance_of(c.table)]
        chains = tuple(chain for chain in found if chain not in ours)
        return chains, _instances("nft", ours)

    def _iptables_tools(self) -> Iterator[str]:
        """The tool for tables made over nf_tables, and the one for the older interface's."""
        names = _NET / "ip_tables_names"
        if names.exists() and not os.access(names, os.R_OK, effective_ids=True):
            self._unseen("firewall", "rules of the older iptables are shown to root alone")
        tools = [
            backend
            for backend in netfilter.CANDIDATES
            if isinstance(backend, netfilter.Iptables) and shutil.which(f"{backend.name}-save")
        ]
        for legacy in (False, True):
            if legacy and not netfilter.legacy_tables():
                continue
            if not legacy and not self._made_by_iptables:
                continue
            for tool in tools:
                if tool.is_legacy == legacy:
                    yield tool.name
                    break
            else:
                kind = "iptables-legacy" if legacy else "iptables-nft"
                self.problems.append(("firewall", f"rules of {kind}, which isn't installed"))

    def _gro(self) -> None:
        from pyroute2.ethtool import Ethtool

        ethtool = Ethtool()
        try:
            links = []
            for link in self.facts.links:
                try:
                    features = ethtool.get_features(link.name).features
                except Exception:  # a link that has no such features, or is gone
                    links.append(link)
                    continue
                on = tuple(name for name in UDP_GRO if name in features and features[name].enable)
                links.append(link._replace(udp_gro=on))
        finally:
            ethtool.close()
        self._add(links=tuple(links))


def _listed() -> tuple[dict[str, Any], str]:
    """All of nft's tables, as JSON and as text; krelay's without the flows in them."""
    entries: list[dict[str, Any]] = []
    texts: list[str] = []
    tables = json.loads(_run("nft", "-j", "list", "tables") or '{"nftables": []}')
    for entry in tables["nftables"]:
        if (table := entry.get("table")) is None:
            continue
        family, name = table["family"], table["name"]
        terse = ("--terse",) if family == "ip" and instance_of(name) else ()
        shown = json.loads(_run("nft", "-j", *terse, "list", "table", family, name))
        entries += shown["nftables"]
        texts.append(_run("nft", "-a", *terse, "list", "table", family, name))
    return {"nftables": entries}, "\n".join(texts)


def _leads_to_ours(rule: Rule) -> bool:
    return rule.verdict.kind == "jump" and bool(instance_of(rule.verdict.target))


def _instances(tool: str, chains: Iterable[Chain]) -> list[Leftover]:
    """The krelays that have these chains, and the queues they feed."""
    texts: dict[str, str] = {}
    for chain in chains:
        name = instance_of(chain.table if tool == "nft" else chain.name)
        if name is not None:
            texts[name] = "\n".join([texts.get(name, ""), *(rule.text for rule in chain.rules)])
    return [Leftover(name, tool, queue_of(text)) for name, text in sorted(texts.items())]


def _is_vrf(link: Any) -> bool:
    info = link.get_attr("IFLA_LINKINFO")
    return bool(info) and info.get_attr("IFLA_INFO_KIND") == "vrf"


def _vrfs(links: Iterable[Any]) -> dict[str, str]:
    """The VRF of each link that is in one."""
    names = {link["index"]: link.get_attr("IFLA_IFNAME") for link in links if _is_vrf(link)}
    masters = ((link.get_attr("IFLA_IFNAME"), link.get_attr("IFLA_MASTER")) for link in links)
    return {name: names[master] for name, master in masters if master in names}


def _table(rule: Any) -> int:
    """The table in which a rule looks, whose number may be too large for the header."""
    return int(rule.get_attr("FRA_TABLE") or rule["table"])


def _path(
    ip: Any,
    to: IPv4Address,
    names: dict[int, str],
    silent: set[tuple[int, str]],
    **given: str | int,
) -> Path:
    """The kernel's answer to `ip route get`, `given` a source (src) and a link (iif)."""
    from pyroute2.netlink.exceptions import NetlinkError

    try:
        (route,) = ip.route("get", dst=str(to), **given)
    except NetlinkError as error:
        if error.code == errno.ENETUNREACH:
            return Path(to, None)
        return Path(to, None, problem=os.strerror(error.code).lower())
    link = route.get_attr("RTA_OIF")
    gateway = route.get_attr("RTA_GATEWAY")
    source = route.get_attr("RTA_PREFSRC")
    own = route["type"] == 2  # RTN_LOCAL (linux/rtnetlink.h)
    return Path(
        to,
        names.get(link),
        IPv4Address(source) if source else None,
        IPv4Address(gateway) if gateway else None,
        "it is an address of this host" if own else "",
        (link, gateway or str(to)) in silent,
    )


def _sockets() -> Iterator[tuple[str, IPv4Address | None, int, int]]:
    """Protocol, address, port and inode of each socket that takes what comes to its port."""
    for proto, states in (("tcp", ("0A",)), ("udp", ("07",))):  # include/net/tcp_states.h
        for table in (proto, f"{proto}6"):
            try:
                lines = (_NET / table).read_text().splitlines()[1:]
            except OSError:
                continue
            for line in lines:
                fields = line.split()
                address, _, port = fields[1].rpartition(":")
                if fields[3] in states:
                    yield proto, _address(address), int(port, 16), int(fields[9])


def _address(text: str) -> IPv4Address | None:
    """As /proc/net/tcp shows it, in the host's order; None for all addresses and for IPv6's."""
    if len(text) != 8:
        return None if not int(text, 16) else IPv4Address("127.0.0.1")
    raw = int(text, 16).to_bytes(4, sys.byteorder)
    return IPv4Address(raw) if any(raw) else None


def _unit(pid: int) -> str:
    """The service that systemd counts the process to."""
    try:
        text = FilePath(f"/proc/{pid}/cgroup").read_text().strip()
    except OSError:
        return ""
    last = text.rpartition("/")[2]
    return last if last.endswith(".service") else ""


def _tracked() -> tuple[int, int] | None:
    base = _SYS / "netfilter"
    try:
        return _number(base / "nf_conntrack_count"), _number(base / "nf_conntrack_max")
    except OSError:
        return None


def _may_enlarge() -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, Direction.RECEIVING, 1)
        except PermissionError:
            return False
    return True


def _netstat(name: str) -> int:
    """A counter of the extended statistics of TCP, which hold those of IP as well."""
    lines = (_NET / "netstat").read_text().splitlines()
    for heads, values in zip(lines[::2], lines[1::2], strict=False):
        counters = dict(zip(heads.split(), values.split(), strict=False))
        if name in counters:
            return int(counters[name])
    return 0


def _is_module(name: str) -> bool:
    """Whether the kernel that runs has this as a module (depmod(8))."""
    try:
        text = FilePath(f"/lib/modules/{os.uname().release}/modules.dep").read_text()
    except OSError:
        return False
    return f"/{name}.ko" in text


def _number(path: FilePath) -> int:
    return int(path.read_text())


def _run(*command: str) -> str:
    done = subprocess.run(
        command,
        env=children.environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
        errors="replace",
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        raise OSError(f"{' '.join(command)}: {lines[0] if lines else 'failed'}")
    return done.stdout


def _reason(error: Exception) -> str:
    """An exception in one line."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
