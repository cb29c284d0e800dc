"""Finds the facts out: /proc, the routing socket, nft and iptables, the file tree.

Each part is looked at by itself, and one that can't be is a line in the facts' problems.  Nothing
is sent and nothing changed (probe sends; that is a part of its own).
"""

import importlib
import os
import resource
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from pathlib import Path as FilePath
from types import MappingProxyType
from typing import Any

from knet import trust
from krelay.control import client as control
from krelay.doctor import seenkernel, seenlinks, seenrules
from krelay.doctor.facts import Facts
from krelay.doctor.seen import Survey
from krelay.host import netfilter, treelock
from krelay.host.cleanup import SOCKETS
from krelay.rules import DEFAULT_QUEUE
from procfs_sim import ondisk
from procfs_sim.ondisk import FileTree
from procfs_sim.tree import SETTINGS, Config, SettingRefused, conflicts, parse

PACKAGES = ("netfilterqueue", "pyroute2", "rich", "inotify_simple")
TOOLS = ("ufw", "firewall-cmd")
CAPNET_ADMIN, CAPNET_RAW = 12, 13  # linux/capability.h
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
    facts = Facts(root=str(root), instance=netfilter.instance(root), queue_num=queue_num)
    seen = Survey(facts, root, client, asked, cheap=cheap)
    for what, part in PARTS:
        if cheap and what not in CHEAP:
            seen.unseen(what, "left out")
            continue
        try:
            part(seen)
        except Exception as error:  # whatever it is, the other parts are worth a look
            reason = _reason(error)
            seen.problems.append((what, reason))
            seen.unseen(what, f"can't be looked at: {reason}")
    seen.add(problems=tuple(seen.problems))
    return seen.facts


def _privileges(seen: Survey) -> None:
    """Who this is, and what it may do and open."""
    status = FilePath("/proc/thread-self/status").read_text()
    (held,) = (
        int(line.split()[1], 16) for line in status.splitlines() if line.startswith("CapEff:")
    )
    seen.add(
        uid=os.geteuid(),
        net_admin=bool(held >> CAPNET_ADMIN & 1),
        net_raw=bool(held >> CAPNET_RAW & 1),
        tools=frozenset(tool for tool in TOOLS if shutil.which(tool)),
        files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
    )


def _packages(seen: Survey) -> None:
    """Whether each package that krelay imports can be imported."""
    missing = []
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    seen.add(missing_packages=tuple(missing))


def _tree(seen: Survey) -> None:
    """The settings in the file tree, or those asked about."""
    tree = FileTree(seen.root)
    values = {}
    for name, setting in SETTINGS.items():
        if (text := tree.read(name)) is None:
            continue
        try:
            values[setting.field] = parse(name, text)
        except SettingRefused as refused:
            seen.problems.append((name, f"{refused}; its default is checked"))
    seen.in_force = Config(**values).gport
    values |= {SETTINGS[name].field: value for name, value in seen.asked.items()}
    config = replace(Config(), **values)
    served = treelock.is_served(seen.root)
    try:
        ondisk.check(seen.root)
    except trust.Untrusted as untrusted:
        seen.add(tree_fault=untrusted.what, tree_fix=untrusted.fix)
    seen.add(
        config=config,
        conflict=next(
            (f"{name}: {reason}" for name, reason in conflicts(config, ("gport",)).items()), ""
        ),
        tree_exists=seen.root.is_dir(),
        served=served,
        stale_sockets=not served and any((seen.root / name).exists() for name in SOCKETS),
    )


def _daemon(seen: Survey) -> None:
    """What a krelay that serves the tree says of itself."""
    if not seen.facts.served:
        return
    status = control.ask_json(seen.root, "show status json")[0]
    same_port = seen.facts.config.gport == seen.in_force
    seen.add(
        state=str(status["state"]),
        tcp_relays=int(status["tcp_relays"]),
        tree_state=str(status.get("tree", "ok")),
        gateway=str(status.get("gateway_port", "")) if same_port else "",
        other_ports=tuple(int(each.partition("/")[2]) for each in status.get("other_port", {})),
        queue_num=int(status["queue"]),
    )


PARTS: tuple[tuple[str, Callable[[Survey], None]], ...] = (
    ("privileges", _privileges),
    ("packages", _packages),
    ("file tree", _tree),
    ("krelay", _daemon),
    ("queue", seenkernel.queue),
    ("rules", seenrules.backend),
    ("links", seenlinks.links),
    ("routes", seenlinks.routes),
    ("uplinks", seenlinks.uplinks),
    ("kernel settings", seenkernel.settings),
    ("listeners", seenkernel.listening),
    ("firewall", seenrules.firewall),
    ("UDP GRO", seenlinks.gro),
)
"""In this order: a part reads what those before it have found."""


def _reason(error: Exception) -> str:
    """An exception in one line."""
    text = str(error).strip().partition("\n")[0] or type(error).__name__
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"
