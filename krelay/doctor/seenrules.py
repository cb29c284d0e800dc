"""How rules can be made here, and those of nft and iptables that there are."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from knet.rules.run import RulesUnavailable
from krelay.control import client as control
from krelay.doctor import iptrules, nftrules
from krelay.doctor.facts import Leftover
from krelay.doctor.firewall import Chain, Chains, Rule
from krelay.doctor.seen import NET, Survey, run
from krelay.host import netfilter
from krelay.offload import tc
from krelay.rules.spec import instance_of, queue_of


def backend(seen: Survey) -> None:
    """How rules can be made."""
    seen.add(backend=None)
    if not seen.facts.net_admin:
        seen.unseen("rules", "CAPNET_ADMIN is wanting, which it takes to make rules")
        return
    if seen.facts.served:
        status = control.ask_json(seen.root, "show status json")[0]
        if status["state"] == "running" or (seen.cheap and status["rules"] != "none"):
            seen.add(backend=status["rules"], datapath=status["datapath"])
            return
    if seen.cheap:
        seen.unseen("rules", "left out")
        return
    try:
        backend = netfilter.probe()
        reason = tc.why_not() if backend.has_maps else netfilter.NO_MAPS
        datapath = "kernel" if reason is None else f"queue ({reason})"
        seen.add(backend=backend.name, datapath=datapath)
    except RulesUnavailable as error:
        seen.add(backend_problem=str(error))


def firewall(seen: Survey) -> None:
    """The rules of nft and of both kinds of iptables."""
    if not seen.facts.net_admin:
        seen.unseen("firewall", "CAPNET_ADMIN is wanting, which it takes to read rules")
        return
    chains, leftovers, made_by_iptables = _nft(seen)
    for tool in _iptables_tools(seen, made_by_iptables):
        text = run(f"{tool}-save")
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
        ours = left.name == seen.facts.instance
        if (ours and not seen.facts.served) or (
            not ours and left.queue is not None and figures_shown() and figures(left.queue) is None
        ):
            dead.append(left)
    seen.add(chains=chains, leftovers=tuple(dead))


def _nft(seen: Survey) -> tuple[Chains, list[Leftover], frozenset[str]]:
    """Chains that nft lists, what is left of krelays, and the tables that iptables has made."""
    if not shutil.which("nft"):
        seen.unseen("firewall", "nft isn't installed, so rules made by it can't be read")
        return (), [], frozenset()
    listing, text = _listed()
    found = nftrules.chains(listing, text)
    ours = [c for c in found if c.family == "ip" and instance_of(c.table)]
    chains = tuple(chain for chain in found if chain not in ours)
    return chains, _instances("nft", ours), nftrules.made_by_iptables(listing)


def _iptables_tools(seen: Survey, made_by_iptables: frozenset[str]) -> Iterator[str]:
    """The tool for tables made over nf_tables, and the one for the older interface's."""
    names = NET / "ip_tables_names"
    if names.exists() and not os.access(names, os.R_OK, effective_ids=True):
        seen.unseen("firewall", "rules of the older iptables are shown to root alone")
    tools = [
        backend
        for backend in netfilter.CANDIDATES
        if isinstance(backend, netfilter.Iptables) and shutil.which(f"{backend.name}-save")
    ]
    for legacy in (False, True):
        if legacy and not netfilter.legacy_tables():
            continue
        if not legacy and not made_by_iptables:
            continue
        for tool in tools:
            if tool.is_legacy == legacy:
                yield tool.name
                break
        else:
            kind = "iptables-legacy" if legacy else "iptables-nft"
            seen.problems.append(("firewall", f"rules of {kind}, which isn't installed"))


def _listed() -> tuple[dict[str, Any], str]:
    """All of nft's tables, as JSON and as text; krelay's without the flows in them."""
    entries: list[dict[str, Any]] = []
    texts: list[str] = []
    tables = json.loads(run("nft", "-j", "list", "tables") or '{"nftables": []}')
    for entry in tables["nftables"]:
        if (table := entry.get("table")) is None:
            continue
        family, name = table["family"], table["name"]
        terse = ("--terse",) if family == "ip" and instance_of(name) else ()
        shown = json.loads(run("nft", "-j", *terse, "list", "table", family, name))
        entries += shown["nftables"]
        texts.append(run("nft", "-a", *terse, "list", "table", family, name))
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
