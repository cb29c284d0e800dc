"""Tables in Markdown, and the sentences that stand in them."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"


class NoSentence(LookupError):
    """Something has no sentence, or a sentence is about nothing.  The text says which."""


@lru_cache
def sentences() -> Mapping[str, Any]:
    """docs/reference/sentences.toml."""
    return tomllib.loads((REFERENCE / "sentences.toml").read_text())


def agree(what: str, named: Iterable[str], have: Mapping[str, str]) -> None:
    """Raises NoSentence unless exactly these have a sentence."""
    names = set(named)
    lacking = [f"no sentence for {name!r}" for name in sorted(names - have.keys())]
    lacking += [
        f"a sentence for {name!r}, which there isn't" for name in sorted(have.keys() - names)
    ]
    if lacking:
        raise NoSentence(f"{what}: " + "; ".join(lacking))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a cell is one line."""
    lines = [" | ".join(head), "|".join(["---"] * len(head))]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in row) for row in rows]
    return "\n".join(f"| {line} |" if "---" not in line[:4] else f"|{line}|" for line in lines)


def code(text: str) -> str:
    """As it is typed."""
    return f"`{text}`" if text else ""
