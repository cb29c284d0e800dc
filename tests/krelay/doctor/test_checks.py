"""Every check, with a host in order and with each thing that may be wrong."""

from collections.abc import Iterable
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Any

import pytest

from krelay.doctor import checks
from krelay.doctor.checks import examine
from krelay.doctor.facts import Facts, Leftover, ListenerFacts, Path, Returned, Uplink
from krelay.doctor.facts import LinkFacts as Link
from krelay.doctor.findings import Finding, Level
from krelay.doctor.firewall import Chain, Match, Rule, RuleVerdict
from krelay.host.tracking import ConntrackTimers as Timers
from procfs_sim.tree import Config, Service

SERVER, CLIENT = IPv4Address("192.168.0.10"), IPv4Address("10.0.0.1")
RELAY = IPv4Address("192.168.0.2")
TO_SERVER = Path(SERVER, "eth1", RELAY)
TO_CLIENT = Path(CLIENT, "eth0", IPv4Address("10.0.0.254"))
LINKS = (Link("eth0"), Link("eth1"))
HEALTHY = Facts(
    links=LINKS,
    own=frozenset({RELAY, IPv4Address("10.0.0.254")}),
    server=TO_SERVER,
    client=TO_CLIENT,
    returned=Returned(answers=True, comes_back=True),
    rmem_max=212992,
)
TCP_ONLY = Config(services=(Service("tcp", 80, 80),))
UDP_ONLY = Config(services=(Service("udp", 53, 53),))
THROUGH = Config(services=(Service("tcp", 443, 443, False, True),))
ONE_ARM: dict[str, Any] = {
    "links": (Link("eth1", send_redirects=True),),
    "client": Path(CLIENT, "eth1", RELAY),
}
BLOCKED = (Chain("nft", "inet", "guard", "forward", (), "forward", policy="drop"),)
ESTABLISHED = Rule("ct state established accept", (Match("state", ("established",)),),
                   RuleVerdict("accept"))  # fmt: skip
TOWARDS = Rule("ip daddr 192.168.0.10 accept", (Match("dst", ((int(SERVER), int(SERVER)),)),),
               RuleVerdict("accept"))  # fmt: skip
LEANING = (replace(BLOCKED[0], rules=(ESTABLISHED, TOWARDS)),)
"""A firewall that lets the server's answers by because their flow is tracked."""
SIP = Config(services=(Service("udp", 5060, 5060),))
UPLINK = Uplink(
    IPv4Address("203.0.113.2"),
    "eth2",
    102,
    own=Path(CLIENT, "eth2", gateway=IPv4Address("203.0.113.1")),
    relayed=Path(CLIENT, "eth0", gateway=IPv4Address("192.0.2.1")),
    free_mark=102,
)
MARKING = (
    "nft 'add table ip uplinks; add chain ip uplinks pre { type filter hook prerouting priority "
    'mangle; }; add rule ip uplinks pre iifname "eth2" ct state new ct mark set 102; '
    "add rule ip uplinks pre ct direction reply ct mark 102 meta mark set 102'"
)
MARKED = Chain(
    "nft", "ip", "uplinks", "pre", (Rule("", (Match("unsure"),), RuleVerdict("mark")),),
    "prerouting", priority=-150,
)  # fmt: skip
RANGE = Config(services=(Service("udp", 5000, 5010), Service("udp", 53, 53)))
NAT_OF_OWN = Chain(
    "nft", "ip", "own-clients", "out",
    (Rule("", (Match("dst_type", ("local",)), Match("proto", ("udp",)),
               Match("dport", ((53, 53),))), RuleVerdict("nat")),),
    "output", kind="nat", priority=-100,
)  # fmt: skip
TFTP_ALONE = Config(services=(Service("udp", 69, 69, any_port=True),))
TFTP = Config(
    services=(
        Service("udp", 60, 69),
        Service("udp", 7, 7, any_port=True),
        Service("udp", 53, 53),
    )
)
ONE_WAY = (
    Chain(
        "nft", "inet", "guard", "forward",
        (
            Rule("", (Match("state", ("established",)),), RuleVerdict("accept")),
            Rule("", (Match("dst", ((int(SERVER), int(SERVER)),)),), RuleVerdict("accept")),
        ),
        "forward", policy="drop",
    ),
)  # fmt: skip
NGINX = ListenerFacts("tcp", None, 80, "nginx", 7, "nginx.service")
RESOLVED = ListenerFacts("udp", IPv4Address("127.0.0.53"), 53, "systemd-resolve", 9)


def worst(facts: Facts, check: str) -> Finding:
    """That check's gravest finding."""
    found = [finding for finding in examine(facts) if finding.check == check]
    return max(found, key=lambda finding: list(Level).index(finding.level))


def test_a_host_in_order_has_only_ok_and_every_check_says_something() -> None:
    findings = examine(HEALTHY)

    assert [finding for finding in findings if finding.level is not Level.OK] == []
    assert len(findings) == len(checks.CHECKS) - 1  # problems has none to tell
    assert [finding.fix for finding in findings if finding.fix] == []


# fmt: off
CASES: list[tuple[str, dict[str, Any], str, str, str]] = [
    # check, what differs from a host in order, level, words of the text, the fix
    ("privileges", {"net_admin": False, "uid": 1000}, "failed", "CAP_NET_ADMIN wanting",
     "sudo krelay doctor"),
    ("privileges", {"net_raw": False, "net_admin": False}, "failed",
     "CAP_NET_ADMIN and CAP_NET_RAW wanting", "sudo krelay doctor"),
    ("privileges", {"uid": 1000}, "ok", "user 1000", ""),
    ("packages", {"missing_packages": ("netfilterqueue", "rich")}, "failed",
     "netfilterqueue rich", "pip install netfilterqueue rich"),
    ("queue", {"has_queue": False}, "failed", "CONFIG_NETFILTER_NETLINK_QUEUE",
     "modprobe nfnetlink_queue"),
    ("queue", {"queue_taken": True}, "failed", "queue 1600 is served by another program",
     "krelay daemon --queue-num 1601"),
    ("queue", {"queue_taken": True, "queue_num": 65535, "root": "/a b"}, "failed", "queue 65535",
     "krelay daemon --root '/a b' --queue-num 65534"),
    ("queue", {"queue_lost": (3, 4)}, "warning", "dropped 3 packets", ""),
    ("rules", {"backend": None, "backend_problem": "nft: not installed"}, "failed",
     "not installed", "apt-get install nftables iptables"),
    ("rules", {"backend": None, "backend_problem": "nft: no such file"}, "failed", "no such", ""),
    ("datapath", {}, "ok", "offloaded to the kernel", ""),
    ("datapath", {"config": Config(datapath="queue"), "datapath": "queue"}, "ok",
     "every packet visits krelay, as the setting says", ""),
    ("datapath", {"backend": "iptables", "datapath": "queue (maps need nft)"}, "warning",
     "every packet visits krelay: maps need nft", "apt-get install nftables"),
    ("datapath", {"backend": "nft, without maps", "datapath": "queue (no maps)"}, "warning",
     "every packet visits krelay: no maps", ""),
    ("krelay", {"served": True, "state": "running", "tcp_relays": 1}, "ok", "running", ""),
    ("krelay", {"served": True, "state": "failed: the queue is lost"}, "failed",
     "the queue is lost", "krelay start"),
    ("krelay", {"served": True, "state": "running", "tcp_relays": 0}, "warning",
     "no tcp-relay", "tcp-relay &"),
    ("krelay", {"served": True, "state": "running", "tcp_relays": 0, "config": UDP_ONLY}, "ok",
     "running", ""),
    ("krelay", {"served": True, "state": "running", "tcp_relays": 0, "config": THROUGH}, "ok",
     "running", ""),
    ("krelay", {"tree_exists": False}, "ok", "there is no /run/krelay", ""),
    ("file tree", {"tree_fault": "/tmp/k belongs to nobody", "tree_fix": "chown root /tmp/k"},
     "failed", "/tmp/k belongs to nobody", "chown root /tmp/k"),
    ("file tree", {"tree_state": "gport: No space left on device"}, "warning",
     "what is in force can't be shown: gport: No space left on device", ""),
    ("leftovers", {"leftovers": (Leftover("krelay", "nft", 1600),)}, "warning", "krelay, nft",
     "krelay clean --keep-settings"),
    ("leftovers", {"leftovers": (Leftover("krelay-0badcafe", "nft", 1601),)}, "warning",
     "what they catch is dropped", "nft delete table ip krelay-0badcafe"),
    ("leftovers", {"leftovers": (Leftover("krelay-0badcafe", "iptables", 1601),)}, "warning",
     "krelay-0badcafe, iptables",
     "iptables -w -t raw -D PREROUTING -j krelay-0badcafe-pre; "
     "iptables -w -t raw -F krelay-0badcafe-pre; iptables -w -t raw -X krelay-0badcafe-pre; "
     "iptables -w -t mangle -D POSTROUTING -j krelay-0badcafe-post; "
     "iptables -w -t mangle -F krelay-0badcafe-post; "
     "iptables -w -t mangle -X krelay-0badcafe-post"),
    ("leftovers", {"stale_sockets": True, "root": "/tmp/k"}, "warning", "/tmp/k holds sockets",
     "krelay clean --keep-settings --root /tmp/k"),
    ("forwarding", {"forwards": False}, "failed", "UDP won't pass",
     "sysctl -w net.ipv4.ip_forward=1"),
    ("forwarding", {"forwards": False, "config": TCP_ONLY}, "warning", "own connections",
     "sysctl -w net.ipv4.ip_forward=1"),
    ("forwarding", {"forwards": False, "config": THROUGH}, "failed", "forwarded TCP won't pass",
     "sysctl -w net.ipv4.ip_forward=1"),
    ("forwarding", {"links": (Link("eth0", forwards=False), Link("eth1"))}, "failed", "by eth0",
     "sysctl -w net/ipv4/conf/eth0/forwarding=1"),
    ("forwarding", {"links": (*LINKS, Link("eth2", forwards=False))}, "ok", "forwards", ""),
    ("rp_filter", {"rp_filter_all": 1}, "ok", "strict on eth0, eth1, nothing dropped", ""),
    ("rp_filter", {"links": (Link("eth0", 1), Link("eth1", 2)), "rp_filtered": 5}, "warning",
     "strict on eth0, and it has dropped 5", "sysctl -w net.ipv4.conf.all.rp_filter=2"),
    ("rp_filter", {"links": (Link("eth0", 1), Link("eth1")), "rp_filter_all": 2,
                   "rp_filtered": 5}, "ok", "not strict", ""),
    ("rp_filter", {"rp_filter_all": 1, "client": Path(CLIENT, None)}, "failed", "10.0.0.1",
     "sysctl -w net.ipv4.conf.all.rp_filter=2"),
    ("VRF", {"links": (Link("eth0", vrf="red"), Link("eth1"))}, "failed", "eth0 in red: addresses",
     "ip link set eth0 nomaster"),
    ("VRF", {"links": (Link("eth0", vrf="red"), Link("eth1", vrf="blue"))}, "failed",
     "eth0 in red, eth1 in blue", "ip link set eth0 nomaster && ip link set eth1 nomaster"),
    ("VRF", {"links": (*LINKS, Link("eth2", vrf="mgmt"))}, "ok", "others are: eth2 (mgmt)", ""),
    ("VRF", {"links": (Link("eth2", vrf="red"), Link("eth1")), "client": Path(CLIENT, None)},
     "failed", "eth2 in red", "ip link set eth2 nomaster"),
    ("uplinks", {"uplinks": (UPLINK,)}, "warning",
     "who ask 203.0.113.2 leave by eth0 via 192.0.2.1, where the server's packets go, not by eth2 "
     "via 203.0.113.1", MARKING + " && ip rule add fwmark 102 lookup 102"),
    ("uplinks", {"uplinks": (UPLINK._replace(mark=7),)}, "warning", "who ask 203.0.113.2",
     MARKING.replace("set 102", "set 7").replace("mark 102", "mark 7")),
    ("uplinks", {"uplinks": (UPLINK._replace(mark=7),), "chains": (MARKED,)}, "ok",
     "by the uplink that was asked", ""),
    ("uplinks", {"uplinks": (UPLINK._replace(free_mark=103),)}, "warning", "who ask 203.0.113.2",
     MARKING.replace("set 102", "set 103").replace("mark 102", "mark 103")
     + " && ip rule add fwmark 103 lookup 102"),
    ("uplinks", {"uplinks": (UPLINK._replace(relayed=UPLINK.own),)}, "ok",
     "by the uplink that was asked", ""),
    ("uplinks", {"uplinks": (UPLINK,), "config": TCP_ONLY}, "ok", "nothing is forwarded", ""),
    ("uplinks", {"uplinks": (UPLINK,), "config": THROUGH}, "warning", "203.0.113.2",
     MARKING + " && ip rule add fwmark 102 lookup 102"),
    ("redirects", ONE_ARM, "warning", "clients and the server are both by eth1",
     "sysctl -w net/ipv4/conf/all/send_redirects=0 && "
     "sysctl -w net/ipv4/conf/eth1/send_redirects=0"),
    ("redirects", ONE_ARM | {"client": None, "default_link": "eth1"}, "warning",
     "clients may come by eth1, where the server is: until",
     "sysctl -w net/ipv4/conf/all/send_redirects=0 && "
     "sysctl -w net/ipv4/conf/eth1/send_redirects=0"),
    ("redirects", ONE_ARM | {"links": (Link("eth1"),)}, "ok", "eth1 sends no ICMP redirects", ""),
    ("redirects", ONE_ARM | {"client": TO_CLIENT}, "ok", "aren't on one link", ""),
    ("redirects", ONE_ARM | {"served": True, "state": "running"}, "ok", "krelay's rules", ""),
    ("redirects", ONE_ARM | {"served": True, "state": "stopped"}, "ok", "as soon as it relays", ""),
    ("return", ONE_ARM | {"returned": None}, "not tried", "while krelay doesn't relay", ""),
    ("return", ONE_ARM | {"returned": Returned(True, False)}, "failed", "`ip route flush cache`",
     "krelay set source relay"),
    ("server", {"server": Path(SERVER, None)}, "failed", "no route to the server, 192.168.0.10",
     "ip route add 192.168.0.10 via GATEWAY"),
    ("server", {"server": Path(SERVER, None, problem="no route to host")}, "failed",
     "can't be reached: no route to host", "krelay set real_ip ADDRESS"),
    ("server", {"server": TO_SERVER._replace(silent=True)}, "warning", "doesn't answer on eth1",
     "ip neigh flush to 192.168.0.10 dev eth1"),
    ("server", {"server": TO_SERVER._replace(gateway=RELAY, silent=True)}, "warning",
     "192.168.0.2 doesn't answer", "ip neigh flush to 192.168.0.2 dev eth1"),
    ("client", {"client": None}, "not tried", "clients are thought to come by eth0", ""),
    ("client", {"client": Path(CLIENT, None)}, "failed", "no route to 10.0.0.1",
     "ip route add 10.0.0.1 via GATEWAY"),
    ("client", {"client": Path(CLIENT, "lo", problem="it is an address of this host")}, "failed",
     "can't be reached: it is an address of this host", ""),
    ("return", {"returned": Returned(True, False)}, "failed",
     "on the server, `ip route replace 10.0.0.1 via 192.168.0.2`", "krelay set source relay"),
    ("return", {"returned": Returned(False, False)}, "warning", "can't tell", ""),
    ("return", {"returned": None, "client": None}, "not tried", "name a client", ""),
    ("return", {"returned": None, "net_raw": False}, "not tried", "CAP_NET_RAW is wanting", ""),
    ("return", {"returned": None, "unseen": (("return", "can't be asked: no link"),)},
     "not tried", "no link", ""),
    ("return", {"returned": None, "server": Path(SERVER, None)}, "not tried", "no way leads", ""),
    ("settings", {"conflict": "gport: '80' is a relayed service port (tcp/80)"}, "failed",
     "relayed service port", ""),
    ("settings", {}, "ok", "real_ip 192.168.0.10, gport 16000, services tcp/80 ", ""),
    ("gateway port", {"config": UDP_ONLY}, "ok", "not used", ""),
    ("forwarding", {"forwards": None}, "not tried", "isn't known", ""),
    ("server", {"server": None}, "not tried", "isn't known", ""),
    ("rules", {"backend": None}, "not tried", "nobody has looked", ""),
    ("datapath", {"backend": None}, "not tried", "without a way to make rules", ""),
    ("buffer", {"buffer_is_granted": False, "rmem_max": None}, "not tried", "core.rmem_max", ""),
    ("files", {"files": None}, "not tried", "isn't known", ""),
    ("return", {"returned": None, "config": Config(source="relay")}, "ok", "source=relay", ""),
    ("return", {"returned": None, "beside": True}, "ok", "in the server's subnet", ""),
    ("gateway port", {"listeners": (NGINX._replace(port=16000),)}, "failed",
     "port 16000 is in use by nginx (pid 7)", "systemctl stop nginx.service"),
    ("gateway port", {"listeners": (NGINX._replace(port=16000, unit=""),)}, "failed", "16000",
     "kill 7"),
    ("answers", {"config": TFTP, "other_ports": (69,)}, "warning",
     "udp/69: the server answers from other ports",
     "krelay set services 'udp/60-69+any-port udp/7+any-port udp/53'"),
    ("answers", {"config": TFTP, "other_ports": (7,)}, "ok", "no server was seen", ""),
    ("answers", {"config": TFTP, "other_ports": (8, 53), "root": "/r"}, "warning",
     "udp/53: the server", "krelay set services --root /r "
     "'udp/60-69 udp/7+any-port udp/53+any-port'"),
    ("firewall", {"config": TFTP_ALONE, "chains": ONE_WAY}, "failed",
     "udp to clients from port 1024-65535 is dropped",
     "nft insert rule inet guard forward ip saddr 192.168.0.10 udp sport 1024-65535 accept"),
    ("services", {"listeners": (NGINX,)}, "warning", "nginx (pid 7) serves tcp/80",
     "systemctl stop nginx.service"),
    ("services", {"listeners": (RESOLVED,)}, "ok", "systemd-resolve, on the loopback alone", ""),
    ("services", {"listeners": (RESOLVED._replace(address=None),)}, "warning", "udp/53 here",
     "kill 9"),
    ("firewall", {"chains": BLOCKED}, "failed", "the policy of nft chain inet guard forward",
     "nft insert rule inet guard forward ip daddr 192.168.0.10 udp dport 53 accept"),
    ("ports", {}, "ok", "28232 for connections to the server", ""),
    ("ports", {"reserved_ports": frozenset(range(32770, 61000))}, "warning", "2 are left",
     "sysctl -w net.ipv4.ip_local_port_range='20000 65535'"),
    ("ports", {"reserved_ports": frozenset(range(1024, 65536))}, "warning",
     "32768 to 60999, without ip_local_reserved_ports",
     "sysctl -w net.ipv4.ip_local_reserved_ports="),
    ("ports", {"port_range": (40000, 40099)}, "warning", "100 are left",
     "sysctl -w net.ipv4.ip_local_port_range='20000 65535'"),
    ("this host", {}, "ok", "programs aren't relayed: let them ask 192.168.0.10 itself", ""),
    ("this host", {"config": RANGE}, "ok", "udp dport { 5000-5010, 53 } dnat to 192.168.0.10'", ""),
    ("this host", {"chains": (NAT_OF_OWN,), "config": UDP_ONLY}, "ok", "by its own rules", ""),
    ("conntrack", {"tracked": (65000, 65536)}, "warning", "65000 of at most 65536",
     "sysctl -w net.netfilter.nf_conntrack_max=131072"),
    ("conntrack", {"tracked": None}, "ok", "none is needed", ""),
    ("timers", {"timers": None}, "ok", "no connection tracking here", ""),
    ("timers", {"timers": Timers(30, 120)}, "ok", "as long as krelay does", ""),
    ("timers", {"timers": Timers(30, 120), "config": SIP}, "ok", "no rule lets answers by", ""),
    ("timers", {"timers": Timers(30, 120), "chains": LEANING, "config": SIP}, "warning",
     "forgets udp flows after 30 s (nf_conntrack_udp_timeout), 120 s (nf_conntrack_udp_timeout_"
     "stream) of silence, krelay after 300 s (timeouts/udp): then what a server says first is "
     "dropped by the policy of nft chain inet guard forward",
     "sysctl -w net.netfilter.nf_conntrack_udp_timeout=300 "
     "net.netfilter.nf_conntrack_udp_timeout_stream=300"),
    ("timers", {"timers": Timers(300, 120), "chains": LEANING, "config": SIP}, "warning",
     "after 120 s (nf_conntrack_udp_timeout_stream)",
     "sysctl -w net.netfilter.nf_conntrack_udp_timeout_stream=300"),
    ("timers", {"timers": Timers(300, 300), "chains": LEANING, "config": SIP}, "ok",
     "as long as krelay does", ""),
    ("timers", {"timers": Timers(10, 120), "chains": LEANING, "config": UDP_ONLY}, "warning",
     "after 10 s (nf_conntrack_udp_timeout) of silence, krelay after 20 s (timeouts/udp_dns)",
     "sysctl -w net.netfilter.nf_conntrack_udp_timeout=20"),
    ("timers", {"timers": Timers(tcp_established=600), "chains": LEANING, "config": THROUGH},
     "warning", "forgets tcp flows after 600 s",
     "sysctl -w net.netfilter.nf_conntrack_tcp_timeout_established=7440"),
    ("timers", {"timers": Timers(30, 120), "chains": BLOCKED, "config": SIP}, "ok",
     "no rule lets answers by", ""),
    ("UDP GRO", {"links": (Link("eth0", udp_gro=("rx-gro-list",)),)}, "warning", "eth0 joins UDP",
     "ethtool -K eth0 rx-gro-list off"),
    ("buffer", {"buffer_is_granted": False}, "warning", "212992 bytes instead of 8388608",
     "sysctl -w net.core.rmem_max=8388608"),
    ("files", {"files": 1024}, "warning", "about 512 TCP connections", "ulimit -Hn 65536"),
    ("links", {"problems": (("links", "no netlink"),)}, "warning",
     "can't be looked at: no netlink", ""),
]
# fmt: on
CASES.append(
    (
        "own ports",
        {"config": Config(services=(Service("udp", 50000, 50100),))},
        "warning",
        "udp/50000-50100 lies among the ports that this host gives its own programs",
        "sysctl -w net.ipv4.ip_local_reserved_ports=50000-50100",
    )
)


@pytest.mark.parametrize(("check", "changes", "level", "words", "fix"), CASES)
def test_a_fault_is_told_with_its_fix(
    check: str, changes: dict[str, Any], level: str, words: str, fix: str
) -> None:
    facts = replace(HEALTHY, **changes)
    finding = worst(facts, check)

    assert (finding.level, finding.fix) == (level, fix)
    assert words in finding.text
    assert "\n" not in str(finding)


@pytest.mark.parametrize("check", checks.NEEDS)
def test_what_could_not_be_looked_at_is_never_ok(check: str) -> None:
    for part in checks.NEEDS[check]:
        facts = replace(HEALTHY, unseen=((part, "can't be looked at: no permission"),))
        (told,) = [finding for finding in examine(facts) if finding.check == check]
        assert (told.level, told.fix) == ("not tried", "")
        assert told.text == "can't be looked at: no permission"


def test_what_was_found_all_the_same_is_told() -> None:
    facts = replace(HEALTHY, chains=BLOCKED, unseen=(("firewall", "nft isn't installed"),))

    assert worst(facts, "firewall").level is Level.FAILED


def test_what_is_not_tried_neither_fails_nor_matters() -> None:
    nothing = tuple((part, "left out") for parts in checks.NEEDS.values() for part in parts)
    findings = examine(replace(HEALTHY, unseen=nothing))

    assert {f.check for f in findings if f.level is Level.OK} == {
        *("privileges", "packages", "settings")
    }
    assert checks.mattering(findings) == checks.fatal(findings) == []


def test_every_check_has_been_seen_to_complain() -> None:
    complaining = {check for check, _, level, _, _ in CASES if level not in ("ok", "not tried")}
    shown = {finding.check for finding in examine(HEALTHY)}

    assert shown - complaining == {"this host"}  # which only tells how it is


def test_only_kernel_settings_and_what_a_dead_krelay_left_are_mended_unasked() -> None:
    safe = {
        finding.fix
        for _, changes, _, _, _ in CASES
        for finding in examine(replace(HEALTHY, **changes))
        if finding.safe
    }

    assert {fix for fix in safe if not fix.startswith(("sysctl -w ", "krelay clean "))} == set()


def test_relaying_does_not_begin_without_what_it_needs_most() -> None:
    fatal = {
        finding.check
        for _, changes, _, _, _ in CASES
        for finding in checks.fatal(examine(replace(HEALTHY, **changes)))
    }

    assert fatal == {"privileges", "packages", "settings", "queue", "rules", "gateway port"}


@pytest.mark.parametrize(
    ("links", "server_link", "default", "client", "expected"),
    [
        (("eth0", "eth1"), "eth1", "eth0", None, "eth0"),
        (("eth0", "eth1"), "eth1", "eth1", None, "eth0"),
        (("eth0", "eth1", "eth2"), "eth1", "eth2", None, "eth2"),
        (("eth0", "eth1", "eth2"), "eth1", "eth1", None, None),
        (("eth0", "eth1", "eth2"), "eth1", "eth1", "eth2", "eth2"),
        (("eth1",), "eth1", "eth1", None, None),
    ],
)
def test_the_clients_link_is_that_of_the_named_client_or_of_the_default_route_or_the_only_other(
    links: tuple[str, ...],
    server_link: str,
    default: str,
    client: str | None,
    expected: str | None,
) -> None:
    facts = Facts(
        links=tuple(map(Link, links)),
        server=Path(SERVER, server_link),
        default_link=default,
        client=Path(CLIENT, client) if client else None,
    )

    assert facts.client_link == expected


@pytest.mark.parametrize(
    ("services", "reserved", "fix"),
    [
        (("udp", 123, 123), (), None),
        (("udp", 32767, 32767), (), None),
        (("udp", 61000, 65535), (), None),
        (("udp", 50000, 50100), range(50000, 50101), None),
        (("udp", 50000, 50100), (), "50000-50100"),
        (("tcp", 40000, 40000), (), "40000"),
        (("udp", 50000, 50100), (8080, 50000), "8080,50000-50100"),
        (("udp", 1024, 33000), (), "32768-33000"),
        (("udp", 1024, 65535), (), ""),
    ],
)
def test_services_among_the_hosts_own_ports(
    services: tuple[str, int, int], reserved: Iterable[int], fix: str | None
) -> None:
    facts = replace(
        HEALTHY,
        config=Config(services=(Service(*services),)),
        port_range=(32768, 60999),
        reserved_ports=frozenset(reserved),
    )
    (found,) = [each for each in examine(facts) if each.check == "own ports"]

    assert found.level is (Level.OK if fix is None else Level.WARNING)
    set_it = "sysctl -w net.ipv4.ip_local_reserved_ports="
    assert found.fix == (set_it + fix if fix else "")
    assert not found.safe
    if fix is not None:
        assert f"{services[0]}/{services[1]}" in found.text
