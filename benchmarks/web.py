"""What is asked of a way from client to server, and who answers.

The server host has nginx on one port, which answers every request with the address that it saw and
has a big file, and on another port the sink of bulk.py.  In the client host run wrk, curl and the
sender of bulk.py.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks import bulk, ground
from benchmarks.ground import CannotMeasure
from krelay_vm import Lab

HTTP, SINK = 80, 81
PORTS = (HTTP, SINK)
CLIENTS = 32
NEEDS = ("nginx", "curl")
BULK_BYTES = 1_000_000_000
_CHECK_SECONDS = 0.01
_ERRORS_ALLOWED = 0.01

_SERVER = """\
daemon off; user root; worker_processes 1; pid {directory}/server.pid;
error_log {directory}/server.err;
events {{ worker_connections 8192; }}
http {{
    access_log off; sendfile on; keepalive_requests 1000000000;
    server {{
        listen {port} backlog=4096;
        location = / {{ default_type text/plain; return 200 "$remote_addr\\n"; }}
        location = /bulk {{ alias {bulk}; }}
    }}
}}
"""
_IN_MILLISECONDS = {"us": 1e-3, "ms": 1.0, "s": 1e3, "m": 6e4}
_LATENCY = re.compile(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s|m)$", re.MULTILINE)
_REQUESTS = re.compile(r"^\s+(\d+) requests in [\d.]+(?:us|ms|s|m),", re.MULTILINE)
_PER_SECOND = re.compile(r"^Requests/sec:\s+([\d.]+)$", re.MULTILINE)
_ERRORS = re.compile(
    r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)"
    r"|Non-2xx or 3xx responses: (\d+)"
)


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk tells of a run; latencies are in milliseconds."""

    requests: int
    per_second: float
    p50: float
    p99: float
    errors: int


@dataclass(frozen=True, slots=True)
class Transfer:
    """What came, and how long it took."""

    bytes: float
    seconds: float

    @property
    def megabytes_per_second(self) -> float:
        """10**6 bytes each."""
        return self.bytes / 1e6 / self.seconds


def make_bulk(path: Path) -> None:
    """A file of zeros that takes no room on the disk; the kernel has its pages at hand then."""
    with path.open("wb") as file:
        file.truncate(BULK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def serve(lab: Lab, big: Path) -> None:
    """Starts both servers."""
    config, errors = lab.directory / "server.conf", lab.directory / "server.err"
    config.write_text(_SERVER.format(directory=lab.directory, port=HTTP, bulk=big))
    lab.start("server", "nginx", "-c", str(config), "-e", str(errors))
    lab.start("server", *ground.PYTHON, bulk.__file__, "sink", str(SINK))
    for port in PORTS:
        lab.wait_listening("server", "tcp", port)


def check(lab: Lab, name: str, address: str, expected: str, big: Path) -> None:
    """Both servers must be reached and see the address `expected`.  Raises CannotMeasure.

    tcp-relay may still be on its way to krelay: the first answer is waited for.
    """

    def answer() -> str:
        command = ("curl", "-s", "-m", "3", f"http://{address}:{HTTP}/")
        return lab.run("client", *command, check=False).stdout.strip()

    seen = {lab.wait(answer, f"an answer through {name}")}
    seen.add(_send(lab, address, _CHECK_SECONDS, big)[0])
    if seen != {expected}:
        raise CannotMeasure(f"{name}: the server saw {' and '.join(seen)}, not {expected}")


def keep_alive(lab: Lab, address: str, seconds: float) -> Load:
    """Requests, one after the other on each of wrk's connections."""
    return _wrk(lab, address, seconds)


def new_connections(lab: Lab, address: str, seconds: float) -> Load:
    """Requests, each on a connection of its own."""
    return _wrk(lab, address, seconds, "-H", "Connection: close")


def _wrk(lab: Lab, address: str, seconds: float, *more: str) -> Load:
    whole = max(1, round(seconds))
    command = ("wrk", "-t1", f"-c{CLIENTS}", f"-d{whole}s", "--latency", *more)
    text = lab.run("client", *command, f"http://{address}:{HTTP}/", timeout=whole + 20).stdout
    load = parse_wrk(text)
    if load.errors > load.requests * _ERRORS_ALLOWED:
        raise CannotMeasure(f"{load.errors} errors and {load.requests} answers: {text.strip()}")
    return load


def parse_wrk(text: str) -> Load:
    """Reads what wrk prints with --latency.  Raises CannotMeasure."""
    requests, per_second = _REQUESTS.search(text), _PER_SECOND.search(text)
    latency = {
        percent: float(value) * _IN_MILLISECONDS[unit]
        for percent, value, unit in _LATENCY.findall(text)
    }
    if requests is None or per_second is None or latency.keys() != {"50", "99"}:
        raise CannotMeasure(f"wrk doesn't tell what it measured: {text.strip()[-300:]}")
    counts = [each.groups() for each in _ERRORS.finditer(text)]
    return Load(
        requests=int(requests[1]),
        per_second=float(per_second[1]),
        p50=latency["50"],
        p99=latency["99"],
        errors=sum(int(count) for groups in counts for count in groups if count),
    )


def download(lab: Lab, address: str, seconds: float) -> Transfer:
    """The big file by curl: all of it, or what has come after so many seconds."""
    say = "%{size_download} %{time_total}"
    command = ("curl", "-s", "-m", f"{seconds:g}", "-o", "/dev/null", "-w", say)
    url = f"http://{address}:{HTTP}/bulk"
    result = lab.run("client", *command, url, timeout=seconds + 10, check=False)
    size, took = map(float, result.stdout.split())
    if not size:
        raise CannotMeasure(f"curl got nothing from {url}, status {result.status}")
    return Transfer(size, took)


def upload(lab: Lab, address: str, seconds: float, big: Path) -> Transfer:
    """As much as goes into the sink in so many seconds."""
    return _send(lab, address, seconds, big)[1]


def _send(lab: Lab, address: str, seconds: float, big: Path) -> tuple[str, Transfer]:
    """The client's address as the sink saw it, and what came."""
    command = (bulk.__file__, "send", address, str(SINK), str(seconds), str(big))
    result = lab.run("client", *ground.PYTHON, *command, timeout=seconds + 40)
    seen, came, took = result.stdout.split()
    return seen, Transfer(float(came), float(took))
