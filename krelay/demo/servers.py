"""The servers of the demo, nginx and dnsmasq as anybody has them: command lines, configuration."""

import os
import pwd
import re
from pathlib import Path

from krelay.demo.evidence import Cast
from krelay_vm import Lab

NAME, ADDRESS = "www.demo.example", "192.0.2.80"
"""What the DNS server is asked for, and what it answers (RFC 2606, RFC 5737)."""
_OWN_ERROR_LOG = (1, 19, 5)
"""Since then `nginx -e` keeps away from the compiled-in error log (nginx.org, CHANGES)."""


def commands(lab: Lab, cast: Cast) -> tuple[tuple[str, ...], ...]:
    """The command lines of nginx and dnsmasq, in the foreground, all files in our directory."""
    directory = lab.directory
    config = directory / "nginx.conf"
    config.write_text(nginx_config(directory, cast, user()))
    nginx = ["nginx", "-c", str(config)]
    version = lab.run("server", "nginx", "-v", check=False)
    if nginx_version(version.stderr) >= _OWN_ERROR_LOG:
        nginx += ["-e", str(directory / "nginx-error.log")]
    dnsmasq = (
        "dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null",
        "--no-resolv", "--no-hosts", f"--address=/{NAME}/{ADDRESS}",
        f"--listen-address={cast.server}", "--bind-interfaces", f"--user={user()}",
        f"--pid-file={directory / 'dnsmasq.pid'}",
        "--log-queries=extra", f"--log-facility={directory / 'dnsmasq-queries.log'}",
    )  # fmt: skip
    return tuple(nginx), dnsmasq


def nginx_config(directory: Path, cast: Cast, user: str) -> str:
    """A server that tells who asks; whatever it writes is below `directory`."""
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "\n".join(f"    {kind}_temp_path {directory}/nginx-{kind};" for kind in kinds)
    return f"""\
user {user};
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx-error.log;
events {{ worker_connections 64; }}
http {{
{paths}
    log_format who '$remote_addr:$remote_port "$request" $status';
    access_log {directory}/nginx-access.log who;
    server {{
        listen {cast.server}:{cast.http};
        location / {{ return 200 "{greeting("$remote_addr:$remote_port")}\\n"; }}
    }}
}}
"""


def nginx_version(text: str) -> tuple[int, ...]:
    """The version in what `nginx -v` prints; (0,) if there is none.

    >>> nginx_version("nginx version: nginx/1.18.0 (Ubuntu)")
    (1, 18, 0)
    """
    match = re.search(r"nginx/(\d+(?:\.\d+)*)", text)
    return tuple(map(int, match[1].split("."))) if match else (0,)


def greeting(endpoint: str) -> str:
    """What nginx answers to who asks from there."""
    return f"The server sees you as {endpoint}."


def user() -> str:
    """Whose name the servers run under."""
    return pwd.getpwuid(os.geteuid()).pw_name
