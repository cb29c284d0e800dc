"""Our packets as the host's own rules see them (rulecheck tells what becomes of them).

Rewriting is done before connection tracking for packets that come, and after the host's rules for
packets that go (ruleset).  So between the two the host sees complete and ordinary conversations:

    T1  C:x > K:A    comes in    new              T2  K:A > C:x    goes out    established
    T3  K:y > S:80   goes out    new              T4  S:80 > K:y   comes in    established
    U1  C:x > S:53   forwarded   new              U3  S:53 > C:x   forwarded   established
                     (and TCP that is written =forward; where the server answers from another
                     port, `+any-port`, that is new, too)

and before ours, in chains of a priority that is no later than raw, the packets as they were sent.
"""

from collections.abc import Iterator
from typing import NamedTuple

from krelay.doctor.facts import Facts
from krelay.doctor.firewall import (
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    Packet,
)

RAW_PRIORITY = -300
EVERYTHING = (HIGHEST_PRIORITY - 1, LOWEST_PRIORITY)
BEFORE_OURS = (HIGHEST_PRIORITY - 1, RAW_PRIORITY)
AFTER_OURS = (RAW_PRIORITY, LOWEST_PRIORITY)
EPHEMERAL = (1024, 65535)
"""Ports from which servers answer that were asked at another (RFC 6056, section 3.2)."""

OWN = "kill or refusal"
"""The step of what krelay itself sends."""
NO_PORTS = (0, 0)
"""ICMP has none."""
LEAVING = ("output", "postrouting")
Ports = tuple[int, int]


class Stage(NamedTuple):
    """A hook, and what of ours it sees."""

    hook: str
    packet: Packet
    ports: Ports
    """First and last of the service, or the gateway port twice."""
    where: str
    """From or to whom, for people."""
    priorities: tuple[int, int] = EVERYTHING


class Passage(NamedTuple):
    """The way of one kind of packets through the host."""

    step: str
    stages: tuple[Stage, ...]


def passages(facts: Facts) -> Iterator[Passage]:
    """Everything of ours that the host's rules get to see."""
    config = facts.config
    server = int(config.real_ip)
    client = int(facts.client.to) if facts.client else None
    near = facts.client_link
    far = facts.server.link if facts.server else None
    ours = int(next(iter(facts.own))) if len(facts.own) == 1 else None
    gate = (config.gport, config.gport)
    links = tuple(link.name for link in facts.links)

    def comes(packet: Packet, ports: Ports, where: str) -> tuple[Stage, Stage]:
        return (
            Stage("ingress", packet, ports, where),
            Stage("prerouting", packet, ports, where, BEFORE_OURS),
        )

    for service in config.services:
        proto, ports = service.proto, (service.first, service.last)
        asked = Packet(proto, client, None, ours, ports[0], near, "", dst_local=True, links=links)
        if proto == "tcp" and not service.forward:
            t1 = asked._replace(dport=config.gport)
            yield Passage(
                "T1",
                (
                    *comes(asked, ports, "from clients"),
                    Stage("prerouting", t1, gate, "from clients", AFTER_OURS),
                    Stage("input", t1, gate, "from clients"),
                ),
            )
            t2 = Packet(
                "tcp", ours, config.gport, client, None, "", near, True, reply=True, links=links
            )
            yield Passage("T2", tuple(Stage(hook, t2, gate, "to clients") for hook in LEAVING))
            t3 = Packet("tcp", ours, None, server, ports[0], "", far, src_local=True, links=links)
            yield Passage("T3", tuple(Stage(hook, t3, ports, "to the server") for hook in LEAVING))
            answer = Packet("tcp", server, ports[0], client, None, far, "", reply=True, links=links)
            t4 = answer._replace(dst=ours, dst_local=True)
            yield Passage(
                "T4",
                (
                    *comes(answer, ports, "from the server"),
                    Stage("prerouting", t4, ports, "from the server", AFTER_OURS),
                    Stage("input", t4, ports, "from the server"),
                ),
            )
        else:
            u1 = Packet(proto, client, None, server, ports[0], near, far, links=links)
            yield Passage(
                "U1",
                (
                    *comes(asked, ports, "from clients"),
                    Stage("prerouting", u1._replace(oif=""), ports, "from clients", AFTER_OURS),
                    Stage("forward", u1, ports, "to the server"),
                    Stage("postrouting", u1, ports, "to the server"),
                ),
            )
            u3 = Packet(proto, server, ports[0], client, None, far, near, reply=True, links=links)
            yield Passage(
                "U3",
                (
                    *comes(u3._replace(oif=""), ports, "from the server"),
                    Stage("prerouting", u3._replace(oif=""), ports, "from the server", AFTER_OURS),
                    Stage("forward", u3, ports, "to clients"),
                    Stage("postrouting", u3, ports, "to clients"),
                ),
            )
            if service.any_port:
                begins = u3._replace(sport=EPHEMERAL[0], reply=False)
                stage = Stage("forward", begins, EPHEMERAL, "to clients")
                yield Passage("U3", (stage,))


def own_packets(facts: Facts) -> Iterator[Passage]:
    """What krelay itself sends, by a raw socket: to who is refused, and to both ends of a forwarded
    connection that is killed.

    Connection tracking knows none of these but those to a server that sees its client; a SYN, by
    which a killed end is made to speak, it takes for a new connection.
    """
    config = facts.config
    server, client = int(config.real_ip), int(facts.client.to) if facts.client else None
    ours = int(next(iter(facts.own))) if len(facts.own) == 1 else None
    near, far = facts.client_link, facts.server.link if facts.server else None
    refuses = config.limits_refusal == "reset"

    def leaving(packet: Packet, ports: Ports, where: str) -> Passage:
        return Passage(OWN, tuple(Stage(hook, packet, ports, where) for hook in LEAVING))

    to_client = "that krelay itself sends to clients"
    for service in config.services:
        ports = (service.first, service.last)
        rst = Packet("tcp", ours, ports[0], client, None, "", near, True, state="invalid")
        if service.proto == "tcp":
            yield leaving(rst, ports, to_client)
        elif refuses:
            error = rst._replace(proto="icmp", sport=None)
            yield leaving(error, NO_PORTS, to_client)
        if service.forward:
            yield leaving(rst._replace(state="new"), ports, to_client)
            end = Packet("tcp", client, None, server, ports[0], "", far, state="established")
            if config.source == "relay":
                end = end._replace(src=ours, src_local=True, state="new")
            yield leaving(end, ports, "that krelay itself sends to the server")
    if config.terminated:
        direct = Packet("tcp", ours, config.gport, client, None, "", near, True, state="invalid")
        yield leaving(direct, (config.gport, config.gport), to_client)
