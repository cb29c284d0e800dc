"""A lab is built, booted and removed: its record, its namespaces, its directory."""

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from krelay_vm import guest, kernels, netns, registry
from krelay_vm.errors import LabError
from krelay_vm.machine import Machine, boot_all
from krelay_vm.registry import Owner, Record
from krelay_vm.topology import Topology

LAB_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
GRACE = 2.0
"""Seconds that what runs in a namespace has to end, once it was killed."""


def machines(topology: Topology, backends: str | Mapping[str, str]) -> dict[str, str]:
    """The hosts that are virtual machines, each with its backend.  Raises LabError."""
    chosen = dict.fromkeys(topology.names, backends) if isinstance(backends, str) else backends
    for host, backend in chosen.items():
        topology.host(host)
        if backend not in guest.BACKENDS:
            raise LabError(f"no backend {backend!r}; there are {', '.join(guest.BACKENDS)}")
    return {host: backend for host, backend in chosen.items() if backend != guest.BACKENDS[0]}


def build(
    topology: Topology,
    name: str | None,
    owner: Owner | None,
    backends: Mapping[str, str],
) -> Record:
    """Builds a lab, which stays if it has no owner; its machines are off.

    Raises LabError, and leaves nothing then.
    """
    if os.geteuid() != 0:
        raise LabError("needs root (network namespaces); try with sudo")
    if name is not None and not LAB_NAME.fullmatch(name):
        raise LabError(f"{name!r} is not a lab's name: a-z, then up to 31 of a-z, 0-9 and hyphen")
    for backend in set(backends.values()):
        kernels.kernel(backend)
    with registry.locked():
        record = _claim(topology, name, owner, backends)
        try:
            directory = Path(record.directory)
            directory.mkdir()
            directory.chmod(0o755)
            netns.build(topology, record.name, backends)
        except OSError as error:
            _discard(record)
            raise LabError(f"lab {record.name}: {error.strerror}") from error
        except BaseException:
            _discard(record)
            raise
    return record


def _claim(
    topology: Topology, name: str | None, owner: Owner | None, backends: Mapping[str, str]
) -> Record:
    for _ in range(100):
        chosen = name or f"krelay-{secrets.token_hex(2)}"
        record = Record(
            name=chosen,
            hosts=topology.names,
            namespaces=tuple(f"{chosen}-{host}" for host in netns.namespaces(topology)),
            directory=f"{tempfile.gettempdir()}/{chosen}",
            owner=owner,
            machines=tuple(backends.items()),
        )
        taken = [n for n in record.namespaces if (netns.RUN / n).exists()]
        if not taken and not Path(record.directory).exists() and registry.claim(record):
            return record
        if name:
            break
    raise LabError(f"there is a lab {name} already, or something else of that name")


def boot_to_stay(record: Record, topology: Topology) -> None:
    """Starts the machines of a lab that stays; they outlive this process.  Raises LabError."""
    booting = [Machine(host, Path(record.directory)) for host, _ in record.machines]
    boot_all(booting, topology, dict(record.machines), f"{record.name}-{{}}".format, tuple)


def remove(record: Record) -> None:
    """Removes a lab: whatever still runs in its namespaces, these, its directory, its record."""
    with registry.locked():
        _discard(record)


def leftovers() -> list[str]:
    """The names of labs whose process is gone without having removed them."""
    return [record.name for record in registry.records() if record.stale]


def remove_leftovers() -> list[str]:
    """Removes those, and returns their names."""
    stale = [record for record in registry.records() if record.stale]
    for record in stale:
        remove(record)
    return [record.name for record in stale]


def _discard(record: Record) -> None:
    netns.kill(record.namespaces)
    deadline = time.monotonic() + GRACE
    while netns.processes(record.namespaces) and time.monotonic() < deadline:
        time.sleep(0.005)
    netns.remove(record.namespaces)
    # The path comes from a file: what isn't called like the lab was not made by it.
    if Path(record.directory).name == record.name:
        shutil.rmtree(record.directory, ignore_errors=True)
    registry.release(record.name)
