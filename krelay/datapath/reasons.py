"""Why a packet isn't rewritten: all reasons, each with its sentence.

Counters, traces and captures name a packet's reason by these words, and the page of counters is
made from the sentences.  Words that packets' parsers and the NAT table give (`BadPacket.reason`,
`Refusal.reason`) are looked up here; nothing else makes reasons.
"""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Self


class Reason(StrEnum):
    """Its value is the word for counters, `sentence` what it means."""

    sentence: str

    def __new__(cls, word: str, sentence: str) -> Self:
        member = str.__new__(cls, word)
        member._value_ = word
        member.sentence = sentence
        return member

    # Packets that no flow claims
    NO_FLOW = "no_flow", "An unmatched packet: no flow claims it, and it begins none."
    ICMP_NO_FLOW = "icmp_no_flow", "An ICMP error about no packet of a flow."
    OWN = "own", "A packet of this host's own, or a reply to one."
    DIRECT = "direct", "A packet of a client's own conversation with the server."
    OTHER_PORT = (
        "other_port",
        "The server answers from another port than it was asked at; the service lacks `+any-port`.",
    )
    BAD_SOURCE = "bad_source", "Its source address can't be a client's (RFC 1812, section 5.3.7)."
    SERVER_ITSELF = (
        "server_itself",
        "It comes to a service from the server's own port, and would be answered for ever.",
    )
    NOT_RELAYING = "not_relaying", "Relaying is off, or the service isn't relayed any more."
    RECOVERING = (
        "recovering",
        "krelay has just begun again; the packet may belong to a flow that isn't resumed yet.",
    )
    ADDRESS_UNKNOWN = (
        "address_unknown",
        "The kernel didn't tell whether the packet's address is this host's.",
    )
    KILLED = "killed", "It belongs to a forwarded flow that was killed; its sender is reset."
    GATEWAY_PORT = "gateway_port", "A client talks to the gateway port itself, and is reset."
    NOT_FORWARDED = (
        "not_forwarded",
        "It can't be forwarded (TTL, MTU); its sender is told so by ICMP.",
    )

    # New flows that are refused
    NO_TCP_RELAY = "no_tcp_relay", "No tcp-relay listens on the gateway port."
    CLIENT_RATE = "client_rate", "The client has begun too many flows this second."
    CLIENT_FULL = "client_full", "The client has as many flows as a client may."
    TABLE_FULL = "table_full", "The table is full of confirmed flows."
    NO_PORT = "no_port", "No port is free for the flow."

    # Packets that aren't what they say, or aren't relayed
    FRAGMENT = "fragment", "A fragment; krelay relays whole packets."
    OTHER_PROTOCOL = "other_protocol", "Neither TCP, UDP nor ICMP."
    SHORT_HEADER = "short_header", "The packet ends within its header."
    BAD_VERSION = "bad_version", "Not IPv4."
    BAD_LENGTH = "bad_length", "Its lengths contradict each other."
    TRUNCATED = "truncated", "The kernel has handed over only the beginning of it."
    ICMP_OTHER = "icmp_other", "An ICMP message that isn't an error which is translated."
    ICMP_QUOTE = "icmp_quote", "An ICMP error that quotes no TCP or UDP packet."
    ICMP_ASTRAY = "icmp_astray", "An ICMP error that doesn't go to the sender of what it quotes."
    ICMP_CHECKSUM = "icmp_checksum", "An ICMP error whose checksum is wrong (RFC 5508, REQ-3)."
    ICMP_QUOTED_CHECKSUM = (
        "icmp_quoted_checksum",
        "An ICMP error about a packet whose header checksum is wrong (RFC 5508, REQ-3a).",
    )


OF_WORD = {str(reason): reason for reason in Reason}
"""To look a word up."""
ALIASES = {"no_row": Reason.NO_FLOW, "icmp_no_row": Reason.ICMP_NO_FLOW}
"""Former words, which `show counters` gives beside the new ones for one release."""


def by_word(counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """What was counted by reason, and by its former word beside the new one."""
    former: dict[str, str] = {reason: word for word, reason in ALIASES.items()}
    for reason, count in counts.items():
        yield reason, count
        if reason in former:
            yield former[reason], count
