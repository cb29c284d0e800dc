"""The ways from client to server that are compared, each set up as one who knows it well would.

Two families.  The plain ones make the server see the relay's address.  The others keep the
client's: HAProxy and nginx by transparent sockets, for which the relay's kernel must deliver what
the server sends back to the client's address; the kernel's own NAT and IPVS, and krelay's
forwarding, by rewriting each packet of one connection from end to end; krelay with tcp-relay by its
rules.

All have one thread or one worker, log nothing, listen with a long backlog and may hold thousands of
connections.  TCP_NODELAY is set by default in all but socat.  nginx and socat have to be told that
after an end of file the other direction goes on.

HAProxy splices where it thinks that this pays (`splice-auto`); in these labs 2.6 never thought so.
nginx has buffers of 16 KB.  So they are mostly run; but both can be made faster at bulk, at the
cost of other things: HAProxy by splicing always, nginx by buffers of 64 KB, which it keeps for each
connection.  These two are there as well, for bulk alone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import ground
from krelay_vm import Lab, Program

HAPROXY_CONFIG = """\
global
    maxconn {connections}
    maxpipes {pipes}
    nbthread 1
defaults
    mode tcp
{splice}
    timeout connect 10s
    timeout client 1h
    timeout server 1h
listen relay
{binds}
    server server {server}{source}
"""
"""A server without a port is asked at the port that the client asked for."""
NGINX_CONFIG = """\
load_module {module};
daemon off;
user root;
worker_processes 1;
pid {directory}/peer.pid;
error_log {directory}/peer.err crit;
events {{ worker_connections {both_sides}; }}
stream {{
    proxy_half_close on;
    proxy_buffer_size {buffer};
{servers}
}}
"""
STREAM_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so"
TRANSPARENT_ROUTING = """\
iptables -t mangle -A PREROUTING -p tcp -m socket --transparent -j MARK --set-mark 1
ip rule add fwmark 1 lookup 100
ip route add local 0.0.0.0/0 dev lo table 100
"""
MOST_CONNECTIONS = 10_200
"""That a peer may hold, if as many files may be open."""
SPLICE = ("auto",)
ALWAYS_SPLICE = ("request", "response")
DEFAULT_BUFFER, LARGE_BUFFER = 16384, 65536
"""Of nginx; in bytes."""
_PIPES = 100
_SPARE_FILES = 300
"""For pipes, listeners and the rest."""
BACKLOG = 4096
_GPORT = 16000

Start = Callable[[Lab, Sequence[int]], list[Program]]
"""Sets a way up in a lab for these ports of the server; the programs that are the relay."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A way from client to server."""

    name: str
    start: Start
    needs: tuple[str, ...] = ()
    """Programs, and files by their path."""
    keeps_client: bool = False
    is_relay: bool = True

    def address(self, lab: Lab) -> str:
        """Where the client finds the server's ports."""
        return lab.address("relay", "client") if self.is_relay else lab.address("server")

    def seen_by_server(self, lab: Lab) -> str:
        """The address that the server must see."""
        return lab.address("client") if self.keeps_client else lab.address("relay", "server")


def capacity() -> int:
    """How many connections a peer can hold on this machine, with two files for each."""
    files = ground.open_files(2 * MOST_CONNECTIONS + _SPARE_FILES)
    return (files - _SPARE_FILES) // 2


def haproxy_config(
    server: str,
    ports: Sequence[int],
    connections: int,
    *,
    splice: Sequence[str] = SPLICE,
    transparent: bool = False,
) -> str:
    """For HAProxy in front of these ports of the server."""
    return HAPROXY_CONFIG.format(
        connections=connections,
        pipes=_PIPES,
        splice="\n".join(f"    option splice-{way}" for way in splice),
        binds="\n".join(f"    bind :{port} backlog {BACKLOG}" for port in ports),
        server=server,
        source=" source 0.0.0.0 usesrc clientip" if transparent else "",
    )


def nginx_config(
    server: str,
    ports: Sequence[int],
    connections: int,
    directory: Path,
    *,
    buffer: int = DEFAULT_BUFFER,
    transparent: bool = False,
) -> str:
    """For nginx's stream module in front of these ports of the server."""
    bind = " proxy_bind $remote_addr transparent;" if transparent else ""
    servers = [
        f"    server {{ listen {port} backlog={BACKLOG}; proxy_pass {server}:{port};{bind} }}"
        for port in ports
    ]
    return NGINX_CONFIG.format(
        module=STREAM_MODULE,
        directory=directory,
        both_sides=2 * connections + _SPARE_FILES,
        buffer=buffer,
        servers="\n".join(servers),
    )


def socat_command(server: str, port: int) -> tuple[str, ...]:
    """socat, which makes a process of each connection."""
    listen = f"TCP-LISTEN:{port},fork,reuseaddr,nodelay,backlog={BACKLOG}"
    return ("socat", "-b65536", "-t3600", listen, f"TCP:{server}:{port},nodelay")


def tcpproxy_command(server: str, port: int) -> tuple[str, ...]:
    """Our own plain proxy."""
    where = (server, str(port), str(port))
    return (*ground.PYTHON, "-m", "tcp_relay.tcpproxy", *where, "--log-level", "warning")


def _direct(lab: Lab, ports: Sequence[int]) -> list[Program]:
    return []


def _haproxy(
    lab: Lab,
    ports: Sequence[int],
    *,
    splice: Sequence[str] = SPLICE,
    transparent: bool = False,
) -> list[Program]:
    config, server = lab.directory / "haproxy.cfg", lab.address("server")
    config.write_text(
        haproxy_config(server, ports, capacity(), splice=splice, transparent=transparent)
    )
    return [_started(lab, ports, "haproxy", "-db", "-f", str(config), transparent=transparent)]


def _nginx(
    lab: Lab,
    ports: Sequence[int],
    *,
    buffer: int = DEFAULT_BUFFER,
    transparent: bool = False,
) -> list[Program]:
    config, where = lab.directory / "nginx-relay.conf", lab.directory
    wanted = (lab.address("server"), ports, capacity(), where)
    config.write_text(nginx_config(*wanted, buffer=buffer, transparent=transparent))
    command = ("nginx", "-c", str(config), "-e", str(where / "peer.err"))
    return [_started(lab, ports, *command, transparent=transparent)]


def _socat(lab: Lab, ports: Sequence[int]) -> list[Program]:
    server = lab.address("server")
    return [_started(lab, [port], *socat_command(server, port)) for port in ports]


def _tcpproxy(lab: Lab, ports: Sequence[int]) -> list[Program]:
    server = lab.address("server")
    return [_started(lab, [port], *tcpproxy_command(server, port)) for port in ports]


def _dnat(lab: Lab, ports: Sequence[int]) -> list[Program]:
    ground.dnat(lab, "tcp", ports)
    return []


def _ipvs(lab: Lab, ports: Sequence[int]) -> list[Program]:
    """A virtual server of one real server, whose gateway is the relay: "masquerading", which keeps
    the client's address (ipvsadm(8)).
    """
    for port in ports:
        service = ("-t", f"{lab.address('relay', 'client')}:{port}")
        lab.run("relay", "ipvsadm", "-A", *service, "-s", "rr")
        lab.run("relay", "ipvsadm", "-a", *service, "-r", f"{lab.address('server')}:{port}", "-m")
    return []


def _krelay(
    lab: Lab, ports: Sequence[int], *, datapath: str, forward: bool = False
) -> list[Program]:
    mode = "=forward" if forward else ""
    services = " ".join(f"tcp/{port}{mode}" for port in ports)
    settings = {"services": services, "gport": str(_GPORT), **ground.DATAPATHS[datapath]}
    # Flows of forwarded connections that have ended stay for minutes (RFC 5382), up to the limit.
    root = ground.start_krelay(lab, settings | ground.NO_LIMITS)
    daemon = lab.programs[-1]
    if forward:
        return [daemon]
    command = ("-m", "tcp_relay", "--root", str(root), "--log-level", "warning")
    return [daemon, _started(lab, [_GPORT], *ground.PYTHON, *command)]


def _started(lab: Lab, ports: Sequence[int], *command: str, transparent: bool = False) -> Program:
    for line in TRANSPARENT_ROUTING.splitlines() if transparent else ():
        lab.run("relay", *line.split())
    program = lab.start("relay", *command)
    for port in ports:
        lab.wait_listening("relay", "tcp", port)
    return program


DIRECT = Peer("direct", _direct, keeps_client=True, is_relay=False)
HAPROXY = Peer("HAProxy", _haproxy, ("haproxy",))
NGINX = Peer("nginx stream", _nginx, ("nginx", STREAM_MODULE))
SOCAT = Peer("socat", _socat, ("socat",))
TCPPROXY = Peer("tcpproxy", _tcpproxy)
HAPROXY_SPLICING = Peer(
    "HAProxy, splicing always", partial(_haproxy, splice=ALWAYS_SPLICE), HAPROXY.needs
)
NGINX_64K = Peer("nginx stream, 64 KB", partial(_nginx, buffer=LARGE_BUFFER), NGINX.needs)
PLAIN = (DIRECT, HAPROXY, NGINX, SOCAT, TCPPROXY)

HAPROXY_KEEPING = Peer(
    "HAProxy usesrc clientip", partial(_haproxy, transparent=True), HAPROXY.needs, keeps_client=True
)
NGINX_KEEPING = Peer(
    "nginx transparent", partial(_nginx, transparent=True), NGINX.needs, keeps_client=True
)
DNAT = Peer("conntrack DNAT", _dnat, ("nft",), keeps_client=True)
IPVS = Peer("IPVS", _ipvs, ("/proc/net/ip_vs", "ipvsadm"), keeps_client=True)


def _krelay_peer(name: str, datapath: str, forward: bool = False) -> Peer:
    start = partial(_krelay, datapath=datapath, forward=forward)
    return Peer(name, start, keeps_client=True)


KRELAY = _krelay_peer("krelay and tcp-relay", ground.AUTO)
KRELAY_QUEUE = _krelay_peer("krelay and tcp-relay, queue path", ground.QUEUE)
FORWARD = _krelay_peer("krelay, =forward", ground.AUTO, forward=True)
FORWARD_QUEUE = _krelay_peer("krelay, =forward, queue path", ground.QUEUE, forward=True)
OURS = (KRELAY, KRELAY_QUEUE, FORWARD, FORWARD_QUEUE)
"""Those with a queue."""
KEEPING = (HAPROXY_KEEPING, NGINX_KEEPING, DNAT, IPVS, *OURS)
