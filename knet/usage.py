"""What the command lines have in common: `--version`, and which word a wrong one was meant to be.

>>> meant("real-ip", ["gport", "real_ip"]), meant("stat", ["start", "status"])
('; did you mean real_ip?', '; did you mean start or status?')
>>> meant("colour", ["gport", "real_ip"])
''
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from knet.version import VERSION

MOST = 2
"""Words that one may have been meant to be."""
ALIKE = 0.7
"""How alike they have to be, of 1 (difflib.SequenceMatcher.ratio)."""
LONGEST = 40
"""Characters of a word that are compared: more is no slip of the pen."""


def nearest(word: str, known: Iterable[str]) -> list[str]:
    """The words that this one may have been meant to be, the likeliest first.

    Its case and the kind of line between its parts don't matter, nor that a folder is left out.

    >>> nearest("udp", ["timeouts/udp", "gport"]), nearest("UDP-DNS", ["timeouts/udp_dns"])
    (['timeouts/udp'], ['timeouts/udp_dns'])
    """
    if len(word) > LONGEST:
        return []
    by_form: dict[str, str] = {}
    for each in known:
        by_form.setdefault(_form(each.rpartition("/")[2]), each)
        by_form[_form(each)] = each
    wanted = _form(word)
    found = get_close_matches(wanted, by_form, MOST, ALIKE)
    if wanted in found:
        found = [wanted]
    return list(dict.fromkeys(by_form[form] for form in found))


def _form(word: str) -> str:
    return word.lower().replace("_", "-")


def meant(word: str, known: Iterable[str]) -> str:
    """What may be added to a message about an unknown word; empty if none is like it."""
    known = list(known)
    found = [] if word in known else nearest(word, known)
    return f"; did you mean {' or '.join(found)}?" if found else ""


class CommandParser(argparse.ArgumentParser):
    """An argument parser that says of a wrong word what it may have been meant to be.

    `nouns`: what the values of an argument are called, by its name (`dest`).  `further`: words that
    it takes without having a list of them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.nouns: Mapping[str, str] = {}
        self.further: Sequence[str] = ()

    def add_version(self) -> None:
        """Adds `--version`."""
        self.add_argument("-V", "--version", action="version", version=f"{self.prog} {VERSION}")

    def read(self, words: Sequence[str] | None = None) -> argparse.Namespace:
        """Like `parse_args`; what a command (`set_defaults(parser=...)`) doesn't understand is told
        with that command's usage.
        """
        found, rest = self.parse_known_args(words)
        if rest:
            parser: CommandParser = getattr(found, "parser", self)
            name = rest[0].partition("=")[0]
            hint = meant(name, parser.known) if name.startswith("-") else ""
            parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
        return found

    @property
    def known(self) -> list[str]:
        """The long options, and the further words."""
        options = [word for word in self._option_string_actions if word.startswith("--")]
        return [*options, *self.further]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Raises ArgumentError, as argparse's own does."""
        if action.choices is None or value in action.choices:
            return
        known = [str(each) for each in action.choices]
        if (noun := self.nouns.get(action.dest)) is None:
            listed = f"invalid choice: {value!r} (choose from {', '.join(map(repr, known))})"
            raise argparse.ArgumentError(action, listed + meant(str(value), known))
        name, is_assigned, text = str(value).partition("=")
        if is_assigned and (found := nearest(name, known)):
            hint = f"; did you mean {found[0]} {text}?"
        else:
            hint = meant(name, [*known, *self.known]) or f"; there are {', '.join(known)}"
        raise argparse.ArgumentError(None, f"no {noun} {value!r}{hint}")
