"""The reasons: each word that is given as one is known, and each that is known is given."""

import ast
from collections.abc import Iterator
from pathlib import Path

from krelay.datapath.reasons import OF_WORD, Reason
from krelay.nat import icmperror

REPOSITORY = Path(__file__).parents[3]
GIVERS = {"BadPacket", "Refusal"}
"""The exceptions whose `reason` the worker looks up."""


def syntax(*packages: str) -> Iterator[tuple[Path, ast.AST]]:
    """Each node of these packages' code, with its file."""
    for package in packages:
        paths = sorted((REPOSITORY / package).rglob("*.py"))
        assert paths, f"{package} has no modules"
        for path in paths:
            for node in ast.walk(ast.parse(path.read_text())):
                yield path.relative_to(REPOSITORY), node


def members(*packages: str) -> set[Reason]:
    """The members of Reason that these packages name."""
    return {
        Reason[node.attr]
        for path, node in syntax(*packages)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "Reason"
    }


def words(*packages: str) -> dict[str, str]:
    """The words that these packages' exceptions are made with, each with a place where it is."""
    found = {}
    for path, node in syntax(*packages):
        match node:
            case ast.ClassDef(name=name, bases=bases):
                inherits = GIVERS & {base.id for base in bases if isinstance(base, ast.Name)}
                assert not inherits, f"{path}: {name} isn't among GIVERS"
            case ast.Call(func=ast.Name(id=name), args=args) if name in GIVERS:
                match args:
                    case [ast.Constant(value=str(word))]:
                        found[word] = f"{path}:{node.lineno}"
                    case [ast.Attribute(value=ast.Name(id="Reason"))]:
                        continue
                    case _:
                        raise AssertionError(f"{path}:{node.lineno}: {name} of a word unknown here")
    return found


def test_words_of_parsers_and_table_are_reasons() -> None:
    unknown = {
        word: place for word, place in words("knet", "krelay").items() if word not in OF_WORD
    }
    assert not unknown, "looking these up raises KeyError in the worker"
    assert OF_WORD.keys() >= icmperror.BROKEN


def test_each_reason_is_given() -> None:
    given = {OF_WORD[word] for word in words("knet", "krelay")} | members("krelay")
    assert set(Reason) == given
