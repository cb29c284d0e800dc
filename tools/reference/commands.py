"""What can be typed: from the parsers themselves."""

import argparse
from argparse import SUPPRESS
from collections.abc import Iterator

import tcp_relay.__main__ as relay
from krelay.cli.parser import parser as krelay_parser
from tcp_relay import tcpproxy
from tools.reference.markdown import code, table

_Subcommands = argparse._SubParsersAction


def krelay() -> str:
    """The options before the command, then each command."""
    parser = krelay_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, _Subcommands))
    own = _arguments(parser)
    parts = [f"```text\n{_usage(parser)} COMMAND\n```", *own]
    for name, sub in commands.choices.items():
        parts += [f"### krelay {name}", *_command(sub)]
    return "\n\n".join(parts)


def tcp_relay() -> str:
    """tcp-relay."""
    return "\n\n".join(_command(relay.parser()))


def tcp_proxy() -> str:
    """tcpproxy."""
    return "\n\n".join(_command(tcpproxy.parser()))


def _command(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield (parser.description or "").strip()
    yield f"```text\n{_usage(parser)}\n```"
    yield from _arguments(parser)
    epilog = (parser.epilog or "").strip()
    if epilog.startswith("example: "):
        lines = [line.strip() for line in epilog.removeprefix("example: ").splitlines()]
        yield "```sh\n" + "\n".join(lines) + "\n```"


def _arguments(parser: argparse.ArgumentParser) -> Iterator[str]:
    rows = []
    for action in parser._actions:
        if isinstance(action, _Subcommands | argparse._HelpAction) or action.help == SUPPRESS:
            continue
        text = parser._get_formatter()._expand_help(action) if action.help else ""
        rows.append((code(_form(action)), text))
    if rows:
        yield table(("argument", "meaning"), rows)


def _usage(parser: argparse.ArgumentParser) -> str:
    """In one line, alike under each version of Python."""
    words = []
    for action in parser._actions:
        if isinstance(action, _Subcommands | argparse._HelpAction | argparse._VersionAction):
            continue
        form = _form(action, short=True)
        words.append(form if action.required and not action.option_strings else f"[{form}]")
    return " ".join([parser.prog, *words])


def _form(action: argparse.Action, *, short: bool = False) -> str:
    """Its names and its value, as they are typed."""
    value = ""
    if action.nargs != 0:
        value = str(action.metavar or action.dest)
        if action.choices is not None and action.metavar is None:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        if action.nargs in ("+", "*"):
            value += " ..."
    names = action.option_strings[-1:] if short else action.option_strings
    return " ".join(filter(None, [", ".join(names), value]))
