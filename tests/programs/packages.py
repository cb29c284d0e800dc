"""What the programs are part of: packages of Debian, and some of PyPI in their own environment.

Setting up installs what is missing.  Services that come with a package are not started, and what
would have another package removed is left out and said: the machine's own clock or mail program is
worth more than a flow of a table.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.programs.table import CLIENTS, PYPI, SERVERS, Client

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv" / "programs"
PYTHON = ENVIRONMENT / "bin" / "python"

SERVICES = (
    "chrony", "coturn", "danted", "dovecot", "etcd", "freeradius", "iperf3", "krb5-admin-server",
    "krb5-kdc", "mariadb", "memcached", "mosquitto", "nbd-server", "nfs-ganesha", "ngircd", "nmbd",
    "opensmtpd", "openvpn", "postgresql", "redis-server", "rpcbind", "rsync", "rsyslog",
    "samba-ad-dc", "slapd", "smbd", "snmpd", "ssh", "tftpd-hpa", "tgt", "tinyproxy", "vsftpd",
)  # fmt: skip
"""What those packages start and enable unless they are kept from it."""


def needed(client: Client) -> tuple[str, ...]:
    """All packages that a client and its server need, the client's own first."""
    server = SERVERS[client.server]
    names = (client.package, server.package, *client.packages, *server.packages)
    return tuple(dict.fromkeys(names))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Those that are installed, with their versions."""
    wanted = set(packages)
    ours = {name for name in wanted if name in PYPI}
    command = ("dpkg-query", "-W", "-f=${db:Status-Status} ${Package} ${Version}\n")
    done = subprocess.run((*command, *sorted(wanted - ours)), capture_output=True, text=True)
    flows = (line.split() for line in done.stdout.splitlines())
    found = {flow[1]: flow[2] for flow in flows if flow[0] == "installed"}
    if ours and PYTHON.exists():
        code = (
            f"from importlib.metadata import version\nfor n in {sorted(ours)}: print(n, version(n))"
        )
        done = subprocess.run((str(PYTHON), "-c", code), capture_output=True, text=True)
        found |= dict(line.split() for line in done.stdout.splitlines())
    return found


def short(version: str) -> str:
    """The part of a Debian version that is the program's own.

    >>> [short(v) for v in ("1:9.18.49-1~deb12u3", "3.2.1+dfsg-4+deb12u1", "15+248+deb12u1")]
    ['9.18.49', '3.2.1', '15']
    """
    upstream = version.partition(":")[2] or version
    upstream = upstream.rpartition("-")[0] or upstream
    return re.split(r"[+~]", upstream)[0]


def set_up() -> int:
    """Installs what is missing, says what stays missing; the exit status."""
    wanted = sorted({name for client in CLIENTS for name in needed(client)} - PYPI.keys())
    found = versions(wanted)
    missing = [name for name in wanted if name not in found]
    print(f"{len(wanted)} packages of Debian are needed, {len(missing)} are missing")
    obstacles = {name: _obstacle(name) for name in missing}
    harmless = [name for name in missing if not obstacles[name]]
    if harmless:
        command = ("bash", str(ROOT / "tools" / "setup"), "--install-as-root")
        as_root = () if os.geteuid() == 0 else ("sudo",)
        print("installing:", *harmless, flush=True)
        subprocess.run(
            (*as_root, *command, "--keep-off", " ".join(SERVICES), *harmless), check=False
        )
    _set_up_python()
    there = versions([*wanted, *PYPI])
    absent = [name for name in (*wanted, *PYPI) if name not in there]
    for name in absent:
        print(f"missing: {name}", *filter(None, (obstacles.get(name),)), sep=": ")
    return 1 if absent else 0


def _obstacle(package: str) -> str | None:
    """Why it isn't installed here, or None."""
    command = ("apt-get", "install", "-s", "--no-install-recommends", package)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"apt-get: status {done.returncode}"])[-1]
    removed = re.findall(r"^Remv (\S+)", done.stdout, re.MULTILINE)
    return f"install it yourself if {', '.join(removed)} may go" if removed else None


def _set_up_python() -> None:
    if versions(PYPI) == PYPI:
        return
    pins = [f"{name}=={version}" for name, version in PYPI.items()]
    pip = (str(PYTHON), "-m", "pip", "--quiet", "--disable-pip-version-check", "install")
    commands: Sequence[Sequence[str]] = (
        (sys.executable, "-m", "venv", str(ENVIRONMENT)),
        (*pip, *pins),
    )
    for command in commands:
        if subprocess.run(command, check=False).returncode:
            return
