"""TCP by way of the relay, the client's address kept: requests, new connections, bulk.

Three labs at once, measured by turns: no relay, krelay with tcp-relay, and the peer that most
people would take, nginx's stream module with `proxy_bind $remote_addr transparent`.  All answers
come from an nginx in the server host, which says whose address it saw: no path is measured that
hides the client's.
"""

import re
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from benchmarks import ground
from benchmarks.figures import Goal
from benchmarks.ground import CannotMeasure, Progress, Wish
from vm import Lab

TITLE = "HTTP, the client's address kept"
DIRECT, KRELAY, NGINX = "direct", "krelay and tcp-relay", "nginx transparent"
REQUESTS, CONNECTIONS, BULK = "{}: requests", "{}: new connections", "{}: download"
GOALS = (
    Goal(
        "keep-alive requests/s, krelay to nginx",
        REQUESTS.format(KRELAY),
        REQUESTS.format(NGINX),
        at_least=0.1,
    ),
    Goal(
        "new connections/s, krelay to nginx", CONNECTIONS.format(KRELAY), CONNECTIONS.format(NGINX)
    ),
    Goal("download, krelay to nginx", BULK.format(KRELAY), BULK.format(NGINX)),
)
STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
CLIENTS = 32
BULK_BYTES = 200_000_000
BULK_SECONDS = 5
"""A slower download is measured by as much as has come by then."""
_PER_SECOND = re.compile(r"^Requests/sec:\s+([\d.]+)", re.MULTILINE)

_SERVER = """\
daemon off; user root; worker_processes 1; pid {dir}/server.pid; error_log {dir}/server.err;
events {{ worker_connections 8192; }}
http {{
    access_log off; sendfile on; keepalive_requests 1000000000;
    server {{
        listen 80 backlog=4096;
        location = / {{ default_type text/plain; return 200 "$remote_addr\\n"; }}
        location = /bulk {{ root {dir}; }}
    }}
}}
"""
_PEER = """\
load_module {module};
daemon off; user root; worker_processes 1; pid {dir}/peer.pid; error_log {dir}/peer.err;
events {{ worker_connections 8192; }}
stream {{
    server {{
        listen 80 backlog=4096;
        proxy_pass {server}:80;
        proxy_bind $remote_addr transparent;
    }}
}}
"""
# What the server sends back to a socket of nginx's goes to the client's address: the kernel must be
# told to deliver it here all the same.
_PEER_ROUTING = """\
iptables -t mangle -A PREROUTING -p tcp -m socket --transparent -j MARK --set-mark 1
ip rule add fwmark 1 lookup 100
ip route add local 0.0.0.0/0 dev lo table 100
"""


def about() -> tuple[str, ...]:
    """How it was measured."""
    return (
        f"Server: nginx, one worker. Requests and connections: `wrk -t1 -c{CLIENTS}`, the latter "
        f"with `Connection: close`. Download: {BULK_BYTES // 1_000_000} MB by curl, cut after "
        f"{BULK_SECONDS} s. The peer is nginx's stream module with "
        "`proxy_bind $remote_addr transparent`, one worker. All share the same cores.",
    )


def measure(wish: Wish, progress: Progress) -> None:
    """Takes the readings."""
    for program in ("nginx", "curl"):
        if shutil.which(program) is None:
            progress.leave_out(f"{TITLE}: {program} isn't installed")
            return
    has_wrk = shutil.which("wrk") is not None
    if not has_wrk:
        progress.leave_out("requests/s and new connections/s: wrk isn't installed")
    with ground.told_plainly(), ExitStack() as stack:
        paths: list[tuple[str, Lab, str]] = []
        for name, prepare in PATHS.items():
            if name == NGINX and not STREAM_MODULE.exists():
                progress.leave_out(f"{NGINX}: {STREAM_MODULE} isn't there (libnginx-mod-stream)")
                continue
            progress.say(f"setting up {name}")
            lab = stack.enter_context(Lab())
            _serve(lab)
            url = f"http://{prepare(lab)}/"
            _check(lab, name, url)
            paths.append((name, lab, url))
        for turn in range(wish.rounds):
            for name, lab, url in paths if has_wrk else ():
                value = _wrk(lab, url, wish.seconds)
                progress.take(turn, wish.rounds, REQUESTS.format(name), "requests/s", value)
            for name, lab, url in paths if has_wrk else ():
                value = _wrk(lab, url, wish.seconds, "-H", "Connection: close")
                progress.take(turn, wish.rounds, CONNECTIONS.format(name), "connections/s", value)
            for name, lab, url in paths:
                value = _download(lab, url + "bulk")
                progress.take(turn, wish.rounds, BULK.format(name), "MB/s", value)


def _direct(lab: Lab) -> str:
    return lab.address("server")


def _krelay(lab: Lab) -> str:
    root = ground.start_krelay(lab, {"services": "tcp/80", "gport": "16000"})
    command = ("-m", "tcp_relay", "--root", str(root), "--log-level", "warning")
    lab.start("relay", *ground.PYTHON, *command)
    lab.wait_listening("relay", "tcp", 16000)
    return lab.address("relay", "client")


def _nginx(lab: Lab) -> str:
    for line in _PEER_ROUTING.splitlines():
        lab.run("relay", *line.split())
    text = _PEER.format(dir=lab.directory, module=STREAM_MODULE, server=lab.address("server"))
    _start_nginx(lab, "relay", text)
    return lab.address("relay", "client")


PATHS: dict[str, Callable[[Lab], str]] = {DIRECT: _direct, KRELAY: _krelay, NGINX: _nginx}
"""Each prepares its lab and returns the address that the client asks."""


def _serve(lab: Lab) -> None:
    bulk = lab.directory / "bulk"
    with bulk.open("wb") as file:
        file.truncate(BULK_BYTES)
    bulk.read_bytes()  # so that the first download doesn't wait for the pages
    _start_nginx(lab, "server", _SERVER.format(dir=lab.directory))


def _start_nginx(lab: Lab, host: str, config: str) -> None:
    path = lab.directory / f"nginx-{host}.conf"
    path.write_text(config)
    lab.start(host, "nginx", "-c", str(path), "-e", str(lab.directory / f"nginx-{host}.err"))
    lab.wait_listening(host, "tcp", 80)


def _check(lab: Lab, name: str, url: str) -> None:
    """The server must see the client's address.  tcp-relay may still be on its way to krelay."""

    def answer() -> str:
        return lab.run("client", "curl", "-s", "-m", "3", url, check=False).stdout.strip()

    seen = lab.wait(answer, f"an answer through {name}")
    if seen != lab.address("client"):
        raise CannotMeasure(f"{name}: the server saw {seen}, not {lab.address('client')}")


def _wrk(lab: Lab, url: str, seconds: float, *more: str) -> float:
    whole = max(1, round(seconds))
    command = ("wrk", "-t1", f"-c{CLIENTS}", f"-d{whole}s", *more, url)
    text = lab.run("client", *command, timeout=whole + 20).stdout
    found = _PER_SECOND.search(text)
    if found is None:
        raise CannotMeasure(f"wrk said nothing of requests: {text.strip()[-300:]}")
    return float(found[1])


def _download(lab: Lab, url: str) -> float:
    command = ("curl", "-s", "-m", str(BULK_SECONDS), "-o", "/dev/null", "-w", "%{speed_download}")
    result = lab.run("client", *command, url, timeout=BULK_SECONDS + 10, check=False)
    return float(result.stdout or 0) / 1e6
