"""The two sockets' languages."""

import dataclasses
from typing import get_args

from krelay.control.commands import HELP, VIEW_HELP
from krelay.registration import messages
from tools.reference.markdown import agree, code, sentences, table

VIEW = {line.partition(" ")[0] for line in VIEW_HELP}


def control() -> str:
    """The commands of the control socket, as `help` lists them."""
    have = sentences()["control"]
    forms = {_command(line): line.partition(" (")[0] for line in HELP}
    agree("control socket", forms, have)
    return table(
        ("command", "answer", "view.sock"),
        (
            (code(form), have[name], "yes, without `pcap`" * (name == "trace") or _in_view(name))
            for name, form in forms.items()
        ),
    )


def _command(line: str) -> str:
    """`show nat`, `kill`: what a line of HELP begins with."""
    words = line.split()
    return " ".join(words[:2] if words[0] == "show" else words[:1])


def _in_view(name: str) -> str:
    return "yes" if name.partition(" ")[0] in VIEW else "no"


def requests() -> str:
    """What tcp-relay says."""
    return _messages("from tcp-relay", get_args(messages.Request))


def answers() -> str:
    """What krelay says."""
    return _messages("from krelay", get_args(messages.Answer))


def _messages(title: str, kinds: tuple[type, ...]) -> str:
    have = sentences()["relay"]
    known = {_op(kind): kind for kind in kinds}
    every = {_op(kind) for kind in get_args(messages.Request) + get_args(messages.Answer)}
    agree("relay socket", every, have)
    return table(
        (title, "fields", "meaning"),
        (
            (code(op), ", ".join(code(f.name) for f in dataclasses.fields(kind)), have[op])
            for op, kind in known.items()
        ),
    )


def _op(kind: type) -> str:
    """`not_listening` of NotListening."""
    return "".join("_" * (i > 0 and c.isupper()) + c.lower() for i, c in enumerate(kind.__name__))
