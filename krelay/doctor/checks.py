"""Facts -> findings: one check a function, in the order in which they are shown.

Nothing here looks at the host, so each check can be shown every host there is.  A mend is a command
as root would type it in a shell; `safe` ones change nothing but kernel settings that relaying needs
and what a dead krelay left.
"""

from collections.abc import Callable, Iterable
from shlex import quote

from knet.rules.ports import merged
from krelay.doctor import passages
from krelay.doctor.facts import Facts, Leftover, ListenerFacts, Path, Uplink
from krelay.doctor.findings import Finding, Level
from krelay.rules import ruleset
from procfs_sim.tree import DEFAULT_ROOT, in_force

OK, WARNING, FAILED = Level.OK, Level.WARNING, Level.FAILED
NOT_TRIED = Level.NOT_TRIED

STRICT = 1
"""rp_filter: a packet must come by the link that leads back to its source (RFC 3704)."""
FILES_A_CONNECTION = 2
FILES_WANTED = 4096
PORTS_WANTED = 1000
WIDE_RANGE = (20000, 65535)
"""Clear of the usual gateway port and of most services."""
NEARLY_FULL = 0.9
DNS = 53


NEEDS = {
    "queue": ("queue",),
    "rules": ("rules",),
    "datapath": ("rules",),
    "krelay": ("krelay",),
    "file tree": ("file tree",),
    "leftovers": ("file tree", "firewall", "queue"),
    "forwarding": ("kernel settings", "links"),
    "rp_filter": ("kernel settings", "links"),
    "VRF": ("links",),
    "redirects": ("links", "routes"),
    "uplinks": ("uplinks", "firewall"),
    "ports": ("kernel settings",),
    "own ports": ("kernel settings",),
    "this host": ("firewall",),
    "answers": ("krelay",),
    "timers": ("kernel settings", "firewall"),
    "server": ("routes",),
    "client": ("routes",),
    "return": ("return", "routes"),
    "gateway port": ("listeners", "gateway port"),
    "services": ("listeners",),
    "firewall": ("firewall", "links"),
    "conntrack": ("kernel settings",),
    "UDP GRO": ("links", "UDP GRO"),
    "buffer": ("kernel settings",),
    "files": ("privileges",),
}
"""The parts of the host (gather.py) that have to be seen before a check can say "ok"."""


def examine(facts: Facts) -> list[Finding]:
    """Every check's findings.  None is ok that rests on what wasn't seen."""
    found = [finding for check in CHECKS for finding in check(facts)]
    return [_as_far_as_seen(facts, finding) for finding in found]


def _as_far_as_seen(facts: Facts, finding: Finding) -> Finding:
    if finding.level is not OK:
        return finding
    needed = NEEDS.get(finding.check, ())
    reasons = [reason for part, reason in facts.unseen if part in needed]
    return _not_tried(finding.check, reasons[0]) if reasons else finding


def _not_tried(check: str, reason: str) -> Finding:
    return Finding(check, NOT_TRIED, reason)


def surroundings(facts: Facts) -> list[Finding]:
    """What makes relaying fail quietly and may come right by itself: routes, forwarding.

    For the daemon, which looks at no more each time it begins.
    """
    return mattering([*forwarding(facts), *server(facts)])


def mattering(findings: Iterable[Finding]) -> list[Finding]:
    """The failures and the warnings."""
    return [finding for finding in findings if finding.level in (WARNING, FAILED)]


def fatal(findings: Iterable[Finding]) -> list[Finding]:
    """Those because of which relaying can't begin."""
    return [finding for finding in findings if finding.fatal]


def privileges(facts: Facts) -> list[Finding]:
    """CAP_NET_ADMIN for rules and queue, CAP_NET_RAW for answers to what is refused."""
    wanting = [
        name
        for name, held in (("CAP_NET_ADMIN", facts.net_admin), ("CAP_NET_RAW", facts.net_raw))
        if not held
    ]
    if wanting:
        text = f"{' and '.join(wanting)} wanting, which krelay needs for its rules and its queue"
        mend = f"sudo krelay doctor{_root(facts)}"
        return [Finding("privileges", FAILED, text, mend, fatal=True)]
    who = "root" if facts.uid == 0 else f"user {facts.uid}"
    return [Finding("privileges", OK, f"{who}, with CAP_NET_ADMIN and CAP_NET_RAW")]


def packages(facts: Facts) -> list[Finding]:
    """What krelay imports."""
    if facts.missing_packages:
        names = " ".join(facts.missing_packages)
        mend = f"pip install {names}"
        return [Finding("packages", FAILED, f"can't be imported: {names}", mend, fatal=True)]
    return [Finding("packages", OK, "all Python packages are there")]


def queue(facts: Facts) -> list[Finding]:
    """The netfilter queue: in the kernel, free, and not overflowing."""
    check, number = "queue", facts.queue_num
    if facts.has_queue is False:
        text = "the kernel has no netfilter queue (CONFIG_NETFILTER_NETLINK_QUEUE)"
        return [Finding(check, FAILED, text, "modprobe nfnetlink_queue", fatal=True)]
    if facts.queue_taken:
        other = number + 1 if number < 0xFFFF else number - 1
        text = f"queue {number} is served by another program"
        mend = f"krelay daemon{_root(facts)} --queue-num {other}"
        return [Finding(check, FAILED, text, mend, fatal=True)]
    full, buffer = facts.queue_lost
    if full or buffer:
        text = (
            f"the kernel dropped {full} packets because queue {number} was full and {buffer} "
            "because its buffer was: more comes than can be rewritten"
        )
        return [Finding(check, WARNING, text)]
    return [Finding(check, OK, f"the kernel has the queue, and {number} is krelay's")]


def rules(facts: Facts) -> list[Finding]:
    """A way to make rules."""
    if facts.backend is not None:
        return [Finding("rules", OK, f"by {facts.backend}")]
    if not facts.backend_problem:
        return [_not_tried("rules", dict(facts.unseen).get("rules", "nobody has looked"))]
    mend = "apt-get install nftables iptables" if "not installed" in facts.backend_problem else ""
    return [Finding("rules", FAILED, facts.backend_problem, mend, fatal=True)]


def datapath(facts: Facts) -> list[Finding]:
    """Whether the kernel relays by itself what krelay has decided about."""
    if facts.backend is None:
        return [_not_tried("datapath", "without a way to make rules there is no data path")]
    if facts.config.datapath == "queue":
        return [Finding("datapath", OK, "every packet visits krelay, as the setting says")]
    if facts.datapath == "kernel":
        return [Finding("datapath", OK, "flows are handed to the kernel")]
    reason = facts.datapath.removeprefix("queue").strip(" ()")
    mend = "" if facts.backend.startswith("nft") else "apt-get install nftables"
    return [Finding("datapath", WARNING, f"every packet visits krelay: {reason}", mend)]


def tracking(facts: Facts) -> list[Finding]:
    """Connection tracking isn't needed, but where it is full the host drops new flows."""
    if facts.tracked is None:
        return [Finding("conntrack", OK, "no connection tracking here, and none is needed")]
    used, most = facts.tracked
    if most and used >= most * NEARLY_FULL:
        text = (
            f"connection tracking holds {used} of at most {most}: new flows are dropped when full"
        )
        mend = f"sysctl -w net.netfilter.nf_conntrack_max={2 * most}"
        return [Finding("conntrack", WARNING, text, mend, safe=True)]
    return [Finding("conntrack", OK, f"{used} connections tracked, of at most {most}")]


def timers(facts: Facts) -> list[Finding]:
    """A firewall that lets answers by because their flow is tracked, and for how long it is."""
    check = "timers"
    if facts.timers is None:
        return [Finding(check, OK, "no connection tracking here, so none of its timers either")]
    shorter = facts.timers.shorter(facts.config)
    if not shorter:
        return [Finding(check, OK, "connection tracking keeps flows as long as krelay does")]
    causes = dict(passages.forgotten(facts))
    findings = []
    for proto, cause in causes.items():
        ending = [timer for timer in shorter if timer.proto == proto]
        if not ending:
            continue
        after = ", ".join(f"{timer.seconds} s ({timer.name})" for timer in ending)
        text = (
            f"connection tracking forgets {proto} flows after {after} of silence, krelay after "
            f"{ending[0].ours} s ({ending[0].setting}): then what a server says first is dropped "
            f"by {cause.cause}"
        )
        raised = " ".join(f"net.netfilter.{timer.name}={timer.ours}" for timer in ending)
        findings.append(Finding(check, WARNING, text, f"sysctl -w {raised}", safe=True))
    return findings or [Finding(check, OK, "no rule lets answers by for connection tracking alone")]


def serving(facts: Facts) -> list[Finding]:
    """What a krelay that runs says of itself, and whether a tcp-relay is with it."""
    if not facts.served:
        here = "" if facts.tree_exists else f"; there is no {facts.root}, so defaults are checked"
        return [Finding("krelay", OK, f"none is running{here}")]
    if facts.state is not None and facts.state.startswith("failed: "):
        return [Finding("krelay", FAILED, facts.state, f"krelay start{_root(facts)}")]
    if facts.tcp_relays == 0 and facts.config.terminated:
        text = "no tcp-relay serves with it: TCP is refused"
        return [Finding("krelay", WARNING, text, f"tcp-relay{_root(facts)} &")]
    return [Finding("krelay", OK, facts.state or "running")]


def tree(facts: Facts) -> list[Finding]:
    """Whether the file tree can be served, and is shown by who serves it."""
    if facts.tree_fault:
        return [Finding("file tree", FAILED, facts.tree_fault, facts.tree_mend)]
    if facts.tree_state != "ok":
        text = f"what is in force can't be shown: {facts.tree_state}"
        return [Finding("file tree", WARNING, text)]
    return [Finding("file tree", OK, f"nobody else can change {facts.root}")]


def forwarding(facts: Facts) -> list[Finding]:
    """UDP, TCP that is forwarded, and the clients' own connections to the server are forwarded by
    the kernel."""
    check, needed = "forwarding", bool(facts.config.forwarded)
    if facts.forwards is None:
        return [_not_tried(check, "whether this host forwards isn't known")]
    if not facts.forwards:
        kinds = {"UDP" if s.proto == "udp" else "forwarded TCP" for s in facts.config.forwarded}
        text = "this host doesn't forward: " + (
            f"{' and '.join(sorted(kinds, reverse=True))} won't pass, "
            "nor the clients' own connections"
            if needed
            else "the clients' own connections to the server won't pass"
        )
        mend = "sysctl -w net.ipv4.ip_forward=1"
        return [Finding(check, FAILED if needed else WARNING, text, mend, safe=True)]
    ends = (facts.client_link, facts.server.link if facts.server else None)
    silent = [link.name for link in facts.links if link.name in ends and not link.forwards]
    if silent:
        mend = " && ".join(f"sysctl -w net/ipv4/conf/{name}/forwarding=1" for name in silent)
        text = f"what comes by {', '.join(silent)} isn't forwarded"
        return [Finding(check, FAILED if needed else WARNING, text, mend, safe=True)]
    return [Finding(check, OK, "this host forwards (net.ipv4.ip_forward=1)")]


def rp_filter(facts: Facts) -> list[Finding]:
    """The larger of all's and the link's is in force (ip-sysctl.rst)."""
    check = "rp_filter"
    strict = [
        link.name for link in facts.links if max(link.rp_filter, facts.rp_filter_all) == STRICT
    ]
    near = facts.client_link
    if not strict:
        return [Finding(check, OK, "not strict on any link")]
    shown = ", ".join(strict)
    mend = "sysctl -w net.ipv4.conf.all.rp_filter=2"
    if facts.rp_filtered:
        text = (
            f"strict on {shown}, and it has dropped {facts.rp_filtered} packets that came by "
            "another link than their answers would take"
        )
        return [Finding(check, WARNING, text, mend, safe=True)]
    if facts.client is not None and facts.client.link is None and facts.client.problem == "":
        text = (
            f"strict on {shown}: packets of {facts.client.to}, to which no route leads, are dropped"
        )
        return [Finding(check, FAILED, text, mend, safe=True)]
    way = f"; clients must come by {near}, as their answers do" if near in strict else ""
    return [Finding(check, OK, f"strict on {shown}, nothing dropped{way}")]


def vrf(facts: Facts) -> list[Finding]:
    """Addresses and routes of a VRF are in its own table, where no rule of ours looks."""
    check = "VRF"
    inside = [link for link in facts.links if link.vrf]
    if not inside:
        return [Finding(check, OK, "no link is in a VRF")]
    ends = [facts.client_link, facts.server.link if facts.server else None]
    if facts.client is not None and facts.client.link is None:
        ends = [None]  # the way to the client may be in any of them
    ours = [link for link in inside if None in ends or link.name in ends]
    if not ours:
        names = ", ".join(f"{link.name} ({link.vrf})" for link in inside)
        return [Finding(check, OK, f"clients and the server aren't in one; others are: {names}")]
    names = ", ".join(f"{link.name} in {link.vrf}" for link in ours)
    text = (
        f"{names}: addresses and routes of a VRF aren't krelay's to see, and nothing is relayed "
        "from it or to it; take the links out, or run krelay in a network namespace with them"
    )
    mend = " && ".join(f"ip link set {link.name} nomaster" for link in ours)
    return [Finding(check, FAILED, text, mend)]


def redirects(facts: Facts) -> list[Finding]:
    """A server that hears of another way to a client answers that client past the relay."""
    check, link = "redirects", facts.one_armed
    if link is None:
        text = "clients and the server aren't on one link, so this host sends no ICMP redirects"
        return [Finding(check, OK, text)]
    if not facts.redirects_leave:
        running = facts.served and facts.state == "running"
        text = "krelay's rules let out" if running else f"{link} sends"
        return [Finding(check, OK, f"{text} no ICMP redirects about the server's packets")]
    if facts.served:
        text = "as soon as it relays, krelay lets out no ICMP redirects about the server's packets"
        return [Finding(check, OK, text)]
    where = f"clients and the server are both by {link}"
    if facts.client is None:
        where = f"clients may come by {link}, where the server is"
    text = (
        f"{where}: until krelay relays, this host may tell the "
        "server by ICMP redirect of another way to a client, which the server keeps for minutes"
    )
    mend = " && ".join(f"sysctl -w net/ipv4/conf/{name}/send_redirects=0" for name in ("all", link))
    return [Finding(check, WARNING, text, mend, safe=True)]


def server(facts: Facts) -> list[Finding]:
    """A route to the real server, and somebody at its end."""
    check, path = "server", facts.server
    if path is None:
        return [_not_tried(check, "the way to it isn't known")]
    set_it = f"krelay set real_ip ADDRESS{_root(facts)}"
    if path.problem:
        return [Finding(check, FAILED, f"{path.to} can't be reached: {path.problem}", set_it)]
    if path.link is None:
        mend = f"ip route add {path.to} via GATEWAY"
        return [Finding(check, FAILED, f"there is no route to the server, {path.to}", mend)]
    by = f"by {path.link}" + (f" via {path.gateway}" if path.gateway else "")
    if path.silent:
        who = path.gateway or path.to
        text = f"{who} doesn't answer on {path.link}: is the server up, and is real_ip right?"
        return [Finding(check, WARNING, text, f"ip neigh flush to {who} dev {path.link}")]
    return [Finding(check, OK, f"{path.to} {by}")]


def uplinks(facts: Facts) -> list[Finding]:
    """The server's answers are routed before they get the address that the client asked."""
    check = "uplinks"
    if not facts.config.forwarded:
        return [
            Finding(check, OK, "nothing is forwarded, and the kernel routes what is terminated")
        ]
    findings = []
    for uplink in facts.uplinks:
        if _way(uplink.own) == _way(uplink.relayed):
            continue
        if uplink.mark is not None and passages.marks_answers(facts):
            continue
        text = (
            f"answers to clients who ask {uplink.address} leave by {_way(uplink.relayed)}, where "
            f"the server's packets go, not by {_way(uplink.own)}, which a rule has for that address"
        )
        findings.append(Finding(check, WARNING, text, _mark(uplink)))
    if findings:
        return findings
    if facts.uplinks:
        return [Finding(check, OK, "answers leave by the uplink that was asked")]
    return [Finding(check, OK, "no rule chooses routes by this host's addresses")]


def _way(path: Path) -> str:
    return f"{path.link} via {path.gateway}" if path.gateway else str(path.link)


def _mark(uplink: Uplink) -> str:
    """A connection mark, of the uplink by which the first packet came, for the answers' routes."""
    mark = uplink.mark or uplink.free_mark
    came, first = f'iifname "{uplink.link}"', []
    if uplink.link == uplink.relayed.link:  # then the address tells, which is there before ours
        came = f"meta mark {mark}"
        first = [
            "add chain ip uplinks first { type filter hook prerouting priority -350; }",
            f"add rule ip uplinks first ip daddr {uplink.address} meta mark set {mark}",
        ]
    lines = (
        "add table ip uplinks",
        *first,
        "add chain ip uplinks pre { type filter hook prerouting priority mangle; }",
        f"add rule ip uplinks pre {came} ct state new ct mark set {mark}",
        *([f"add rule ip uplinks pre {came} meta mark set 0"] if first else []),
        f"add rule ip uplinks pre ct direction reply ct mark {mark} meta mark set {mark}",
    )
    chosen = f"ip rule add fwmark {mark} lookup {uplink.table}"
    return f"nft {quote('; '.join(lines))}" + ("" if uplink.mark else f" && {chosen}")


def client(facts: Facts) -> list[Finding]:
    """A route to the client."""
    check, path = "client", facts.client
    if path is None:
        link = facts.client_link
        where = f"by {link}" if link else "by any link"
        return [_not_tried(check, f"none named (--client IP); clients are thought to come {where}")]
    if path.problem:
        return [Finding(check, FAILED, f"{path.to} can't be reached: {path.problem}")]
    if path.link is None:
        mend = f"ip route add {path.to} via GATEWAY"
        return [Finding(check, FAILED, f"there is no route to {path.to}", mend)]
    return [Finding(check, OK, f"{path.to} by {path.link}")]


def return_path(facts: Facts) -> list[Finding]:
    """The server's answers to a client must come back through here."""
    check, path = "return", facts.server
    if path is None or path.link is None:
        return [_not_tried(check, "no way leads to the server")]
    here = path.source or "ADDRESS OF THE RELAY"
    if facts.config.source == "relay":
        return [Finding(check, OK, "source=relay: the server answers this host")]
    if facts.beside:
        text = "the client is in the server's subnet, so source=relay is used for it"
        return [Finding(check, OK, text)]
    if facts.client is None:
        text = "name a client with --client IP; the server must reach clients through "
        return [_not_tried(check, f"{text}{here}")]
    seen = facts.returned
    if seen is None:
        if facts.redirects_leave:
            reason = "while krelay doesn't relay, it would bring an ICMP redirect about"
            return [_not_tried(check, reason)]
        reason = facts.client.problem or "CAP_NET_RAW is wanting, without which nothing can be sent"
        return [_not_tried(check, dict(facts.unseen).get("return", reason))]
    if seen.comes_back:
        return [Finding(check, OK, f"the server's answer to {facts.client.to} came back here")]
    if not seen.answers:
        text = f"{path.to} answers neither ICMP echo nor a TCP connection of ours: can't tell"
        return [Finding(check, WARNING, text)]
    text = (
        f"the server answers this host, but its answer to {facts.client.to} didn't come back: "
        f"on the server, `ip route replace {facts.client.to} via {here}`, or have it see the relay"
    )
    if facts.one_armed:
        text += "; an ICMP redirect, if it keeps one, goes by `ip route flush cache` there"
    return [Finding(check, FAILED, text, f"krelay set source relay{_root(facts)}")]


def gateway_port(facts: Facts) -> list[Finding]:
    """Nobody but tcp-relay may listen there."""
    check, port = "gateway port", facts.config.gport
    if not facts.config.terminated:
        return [Finding(check, OK, "not used: no service needs tcp-relay")]
    taken = [one for one in facts.listeners if one.proto == "tcp" and one.port == port]
    if not taken and " is in use by " in facts.gateway:
        return [Finding(check, FAILED, f"{facts.gateway}: clients of TCP are refused", "")]
    if not taken:
        return [Finding(check, OK, f"{port} is free for tcp-relay, or tcp-relay's")]
    text = f"port {port} is in use by {_who(taken[0])}: clients would meet it instead of the server"
    return [Finding(check, FAILED, text, _stop(taken[0]), fatal=True)]


def services(facts: Facts) -> list[Finding]:
    """A server of this host on a relayed port is hidden while krelay relays."""
    findings = []
    for one in facts.listeners:
        if not facts.config.serves(one.proto, one.port):
            continue
        what = f"{one.proto}/{one.port}"
        if one.address is not None and one.address.is_loopback:
            continue  # nobody else could reach it, and it goes on answering this host
        text = f"{_who(one)} serves {what} here: other hosts won't reach it while {what} is relayed"
        findings.append(Finding("services", WARNING, text, _stop(one)))
    if findings:
        return list(dict.fromkeys(findings))
    local = {one.program for one in facts.listeners if facts.config.serves(one.proto, one.port)}
    beside = f" (but {', '.join(sorted(local))}, on the loopback alone)" if local else ""
    return [Finding("services", OK, f"no server of this host is on a relayed port{beside}")]


def ports(facts: Facts) -> list[Finding]:
    """tcp-relay takes each connection's port towards the server from the host's own range."""
    check, (low, high) = "ports", facts.port_range
    if not facts.config.terminated:
        return []

    def left(first: int, last: int) -> int:
        return last + 1 - first - sum(first <= port <= last for port in facts.reserved_ports)

    if (found := left(low, high)) >= PORTS_WANTED:
        return [Finding(check, OK, f"{found} for connections to the server")]
    reserved = ", without ip_local_reserved_ports" if facts.reserved_ports else ""
    text = (
        f"{found} are left for connections to the server (net.ipv4.ip_local_port_range, {low} to "
        f"{high}{reserved}): tcp-relay, which looks when it starts, has no more at a time"
    )
    if left(*WIDE_RANGE) >= PORTS_WANTED:
        mend = f"sysctl -w net.ipv4.ip_local_port_range='{WIDE_RANGE[0]} {WIDE_RANGE[1]}'"
    else:
        mend = "sysctl -w net.ipv4.ip_local_reserved_ports="
    return [Finding(check, WARNING, text, mend)]


def own_ports(facts: Facts) -> list[Finding]:
    """Ports that the kernel gives this host's own programs shouldn't be a service's.

    Replies to such a program reach it all the same (ownflows.py), but each of them visits krelay.
    """
    check, (low, high) = "own ports", facts.port_range
    met = [
        service
        for service in facts.config.services
        if not facts.reserved_ports.issuperset(
            range(max(low, service.first), min(high, service.last) + 1)
        )
    ]
    if not met:
        text = f"no service lies among those of the host's own programs, {low} to {high}"
        return [Finding(check, OK, text)]
    wanted = {
        port
        for service in met
        for port in range(max(low, service.first), min(high, service.last) + 1)
    }
    reserved = facts.reserved_ports | wanted
    names = ", ".join(f"{s.proto}/{s.first}-{s.last}".removesuffix(f"-{s.first}") for s in met)
    text = (
        f"{names} lies among the ports that this host gives its own programs "
        f"(net.ipv4.ip_local_port_range, {low} to {high}): what these get back visits krelay"
    )
    if high + 1 - low - sum(low <= port <= high for port in reserved) < PORTS_WANTED:
        return [Finding(check, WARNING, f"{text}; relay fewer ports")]
    spans = merged((port, port) for port in reserved)
    listed = ",".join(f"{a}-{b}" if b > a else f"{a}" for a, b in spans)
    mend = f"sysctl -w net.ipv4.ip_local_reserved_ports={listed}"
    return [Finding(check, WARNING, text, mend)]


def own_clients(facts: Facts) -> list[Finding]:
    """What this host sends to itself never leaves it, and no rule of ours looks at it."""
    check = "this host"
    if passages.translates_own(facts):
        return [Finding(check, OK, "its own programs reach the services by its own rules")]
    spans = {
        proto: [
            f"{s.first}-{s.last}" if s.last > s.first else f"{s.first}"
            for s in facts.config.services
            if s.proto == proto
        ]
        for proto in ("tcp", "udp")
    }
    rules = [
        f"add rule ip own-clients out ip daddr != 127.0.0.0/8 fib daddr type local "
        f"{proto} dport {{ {', '.join(ports)} }} dnat to {facts.config.real_ip}"
        for proto, ports in spans.items()
        if ports
    ]
    lines = (
        "add table ip own-clients",
        "add chain ip own-clients out { type nat hook output priority -100; }",
        *rules,
    )
    text = (
        f"its own programs aren't relayed: let them ask {facts.config.real_ip} itself, or have "
        f"the kernel lead them there: nft {quote('; '.join(lines))}"
    )
    return [Finding(check, OK, text)]


def answers(facts: Facts) -> list[Finding]:
    """A server that answers from other ports (TFTP) is heard only where the service allows it."""
    check, config = "answers", facts.config
    at = [
        port
        for port in facts.other_ports
        if any(s.contains("udp", port) and not s.any_port for s in config.services)
    ]
    if not at:
        return [Finding(check, OK, "no server was seen to answer from another port than is asked")]
    text = (
        f"{', '.join(f'udp/{port}' for port in at)}: the server answers from other ports, which no "
        "client gets to see"
    )
    wanted = (
        s._replace(any_port=s.any_port or any(s.contains("udp", port) for port in at))
        for s in config.services
    )
    mend = f"krelay set services{_root(facts)} {quote(' '.join(map(str, wanted)))}"
    return [Finding(check, WARNING, text, mend)]


def gro(facts: Facts) -> list[Finding]:
    """Joined UDP packets of a new flow are lost before the queue (nfnetlink_queue.c; since kernel
    commit 7d8dc1c7be8d)."""
    findings = []
    for link in facts.links:
        if link.udp_gro:
            off = " ".join(f"{feature} off" for feature in link.udp_gro)
            text = (
                f"{link.name} joins UDP packets; the first of a new flow may be lost in the queue"
            )
            findings.append(Finding("UDP GRO", WARNING, text, f"ethtool -K {link.name} {off}"))
    return findings or [Finding("UDP GRO", OK, "off on every link")]


def buffer(facts: Facts) -> list[Finding]:
    """Who has CAP_NET_ADMIN may go over rmem_max (SO_RCVBUFFORCE, socket(7)); a user namespace's
    root may not."""
    check = "buffer"
    if facts.rmem_max is None and not facts.buffer_is_granted:
        return [_not_tried(check, "this network namespace doesn't show net.core.rmem_max")]
    if facts.buffer_is_granted or facts.rmem_max is None or facts.rmem_max >= facts.buffer:
        return [Finding(check, OK, f"{facts.buffer} bytes for the queue's socket")]
    text = f"the queue's socket gets {facts.rmem_max} bytes instead of {facts.buffer}"
    if facts.net_admin:
        text += ", as in any user namespace; root outside of it may raise the limit"
    mend = f"sysctl -w net.core.rmem_max={facts.buffer}"
    return [Finding(check, WARNING, text, mend, safe=not facts.net_admin)]


def files(facts: Facts) -> list[Finding]:
    """tcp-relay takes what it can get, the hard limit; a connection costs two."""
    if facts.files is None:
        return [_not_tried("files", "how many may be open isn't known")]
    most = facts.files // FILES_A_CONNECTION
    if facts.files < FILES_WANTED:
        text = f"{facts.files} files may be open: about {most} TCP connections at a time"
        return [Finding("files", WARNING, text, "ulimit -Hn 65536")]
    return [Finding("files", OK, f"{facts.files} may be open: {most} TCP connections at a time")]


def leftovers(facts: Facts) -> list[Finding]:
    """What a killed krelay left: its rules drop what they catch while nobody serves the queue."""
    findings = []
    for left in facts.leftovers:
        text = (
            f"rules of a krelay that is gone ({left.name}, {left.tool}): what they catch is dropped"
        )
        safe = left.name == facts.instance
        findings.append(Finding("leftovers", WARNING, text, _removal(facts, left), safe))
    if facts.stale_sockets and not facts.leftovers:
        text = f"{facts.root} holds sockets of a krelay that is gone"
        mend = f"krelay clean --keep-settings{_root(facts)}"
        findings.append(Finding("leftovers", WARNING, text, mend, safe=True))
    return findings or [Finding("leftovers", OK, "nothing of a dead krelay's")]


def problems(facts: Facts) -> list[Finding]:
    """What couldn't be looked at."""
    return [
        Finding(what, WARNING, f"can't be looked at: {reason}") for what, reason in facts.problems
    ]


def settings(facts: Facts) -> list[Finding]:
    """What is checked: the values in force, or those that were asked about."""
    if facts.conflict:
        return [Finding("settings", FAILED, facts.conflict, fatal=True)]
    shown = ", ".join(
        f"{name} {in_force(name, facts.config)}"
        for name in ("real_ip", "gport", "services", "source")
    )
    return [Finding("settings", OK, shown)]


CHECKS: tuple[Callable[[Facts], list[Finding]], ...] = (
    privileges,
    packages,
    settings,
    queue,
    rules,
    datapath,
    serving,
    tree,
    leftovers,
    forwarding,
    rp_filter,
    vrf,
    redirects,
    server,
    client,
    uplinks,
    return_path,
    gateway_port,
    services,
    ports,
    own_ports,
    own_clients,
    answers,
    passages.check,
    tracking,
    timers,
    gro,
    buffer,
    files,
    problems,
)


def _root(facts: Facts) -> str:
    return "" if facts.root == DEFAULT_ROOT else f" --root {quote(facts.root)}"


def _who(one: ListenerFacts) -> str:
    return one.program if one.pid is None else f"{one.program} (pid {one.pid})"


def _stop(one: ListenerFacts) -> str:
    if one.unit:
        return f"systemctl stop {quote(one.unit)}"
    return f"kill {one.pid}" if one.pid is not None else ""


def _removal(facts: Facts, left: Leftover) -> str:
    """`krelay clean` where it is this tree's; the tree of another can't be told from the name."""
    if left.name == facts.instance:
        return f"krelay clean --keep-settings{_root(facts)}"
    if left.tool == "nft":
        return f"nft delete table ip {left.name}"
    return "; ".join(
        f"{left.tool} -w -t {chain.table} {command}"
        for chain in ruleset.chains(left.name)
        for command in (
            f"-D {chain.builtin} -j {chain.name}",
            f"-F {chain.name}",
            f"-X {chain.name}",
        )
    )
