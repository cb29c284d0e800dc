"""Every message that is logged, found in the source.

A message is the first argument of `debug`, `info`, `warning` or `error` of a Log.  Where that is a
parameter, the function only passes it on, and the messages are those of its callers.  A part that
isn't constant stands in braces, as the source names it.
"""

import ast
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tools.reference.markdown import agree, code, sentences, table

ROOT = Path(__file__).parents[2]
LEVELS = ("debug", "info", "warning", "error")
PROGRAMS = {
    "tcp_relay/proxy": "tcpproxy",
    "tcp_relay/tcpproxy.py": "tcpproxy",
    "tcp_relay/relay": "tcp-relay",
    "tcp_relay": "tcp-relay and tcpproxy",
    "krelay": "krelay",
    "procfs_sim": "krelay",
    "knet": "all programs",
}
"""Who says what is logged there; the first that fits."""
TITLES = tuple(dict.fromkeys(["krelay", "tcp-relay", "tcp-relay and tcpproxy", *PROGRAMS.values()]))


class Event(NamedTuple):
    """A message that is logged somewhere."""

    program: str
    message: str
    level: str
    fields: tuple[str, ...]


def tables() -> str:
    """A table for each program."""
    have = sentences()["log"]
    parts = []
    for program in TITLES:
        found = [event for event in events() if event.program == program]
        agree(f"log of {program}", (event.message for event in found), have.get(program, {}))
        rows = [
            (e.message, e.level, ", ".join(map(code, e.fields)), have[program][e.message])
            for e in found
        ]
        parts.append(f"## {program}\n\n" + table(("message", "level", "fields", "meaning"), rows))
    return "\n\n".join(parts)


@lru_cache
def events() -> tuple[Event, ...]:
    """All of them, by program and message; one that is logged at several places is there once."""
    found: dict[tuple[str, str], Event] = {}
    for event in _logged():
        same = found.get(event[:2])
        if same:
            levels = [level for level in LEVELS if level in (*same.level.split(", "), event.level)]
            fields = tuple(dict.fromkeys(same.fields + event.fields))
            event = event._replace(level=", ".join(levels), fields=fields)
        found[event[:2]] = event
    return tuple(sorted(found.values()))


def _logged() -> Iterator[Event]:
    sources = [
        (path.relative_to(ROOT), ast.parse(path.read_text()))
        for package in ("knet", "procfs_sim", "krelay", "tcp_relay")
        for path in sorted((ROOT / package).rglob("*.py"))
    ]
    passed_on: dict[tuple[str, Path | None], tuple[int, Event]] = {}
    for path, tree in sources:
        for function, call in _calls(tree):
            if not _is_log(call):
                continue
            event = Event(_program(path), "", call.func.attr, _fields(call))  # type: ignore[attr-defined]
            message = call.args[0]
            parameters = [arg.arg for arg in function.args.args] if function else []
            if function and isinstance(message, ast.Name) and message.id in parameters:
                private = path if function.name.startswith("_") else None
                passed_on[function.name, private] = parameters.index(message.id) - 1, event
            else:
                for text in _texts(message, function):
                    yield event._replace(message=text)
    for path, tree in sources:
        for function, call in _calls(tree):
            name = getattr(call.func, "attr", "")
            known = passed_on.get((name, path)) or passed_on.get((name, None))
            if known is None or len(call.args) <= known[0]:
                continue
            place, event = known
            fields = tuple(dict.fromkeys(event.fields + _fields(call)))
            for text in _texts(call.args[place], function):
                yield Event(_program(path), text, event.level, fields)


def _program(path: Path) -> str:
    return next(name for place, name in PROGRAMS.items() if path.is_relative_to(place))


def _calls(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
    """Each call, and the innermost function around it."""

    def walk(
        node: ast.AST, function: ast.FunctionDef | None
    ) -> Iterator[tuple[ast.FunctionDef | None, ast.Call]]:
        if isinstance(node, ast.FunctionDef):
            function = node
        if isinstance(node, ast.Call):
            yield function, node
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function)

    return walk(tree, None)


def _is_log(call: ast.Call) -> bool:
    """Whether that is a method of a Log, called `log`, `_log` or `log.Log(...)`."""
    match call.func:
        case ast.Attribute(value=of, attr=attr) if attr in LEVELS and call.args:
            if isinstance(of, ast.Call):
                of = of.func
            return ast.unparse(of).rpartition(".")[2].lstrip("_") in ("log", "Log")
    return False


def _fields(call: ast.Call) -> tuple[str, ...]:
    return tuple(keyword.arg for keyword in call.keywords if keyword.arg)


def _texts(message: ast.expr, function: ast.FunctionDef | None) -> Iterator[str]:
    """The messages that an expression stands for."""
    match message:
        case ast.Constant(value=str(text)):
            yield text
        case ast.IfExp(body=body, orelse=orelse):
            yield from _texts(body, function)
            yield from _texts(orelse, function)
        case ast.JoinedStr(values=values):
            yield "".join(
                str(part.value)
                if isinstance(part, ast.Constant)
                else f"{{{ast.unparse(part.value)}}}"
                for part in values
                if isinstance(part, ast.Constant | ast.FormattedValue)
            )
        case ast.Name(id=name) if function and (given := list(_given(name, function))):
            for value in given:
                yield from _texts(value, function)
        case _:
            yield f"{{{ast.unparse(message)}}}"


def _given(name: str, function: ast.FunctionDef) -> Iterator[ast.expr]:
    """What a function puts into a variable of its own."""
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if target == name:
                yield value
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                for each, value in zip(names, values, strict=False):
                    if isinstance(each, ast.Name) and each.id == name:
                        yield value
