"""What makes plain files behave like procfs: texts in, the values in force and what to show out.

A text that is accepted changes the values in force; one that is refused is to be replaced by the
value in force, and its reason stays listed until a good text comes.  Files that were written
together are tried together, so that two that fit only each other (a gateway port and a list of
services) may change in either order.  Nothing here reads a file or a clock.

Two things are easy to get wrong.  A shell truncates a file before it writes it, so an empty text is
nothing yet; only a file that stays empty is judged, and `next_deadline` says when.  And what is
written back is itself seen as a write: that echo must not pass for the user's good text, or each
reason would vanish at once.

    >>> state = TreeState()
    >>> state.written({"gport": "abc\\n"}, now=0.0).show["gport"]
    '16000\\n'
    >>> state.errors["gport"]
    "gport: 'abc' is not a port (1-65535); 16000 stays in force"
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from procfs_sim.tree import (
    BLANKS,
    DEFAULTS,
    SETTINGS,
    Config,
    SettingRefused,
    conflicts,
    in_force,
    parse,
    render,
)

EMPTY_GRACE = 1.0
"""Seconds that a file may stay empty."""

HostCheck = Callable[[Config, Config, frozenset[str]], Mapping[str, str]]
"""(config in force, config to be, names that change) -> reason of each name that is refused."""


def no_host_check(old: Config, new: Config, changed: frozenset[str]) -> Mapping[str, str]:
    """Refuses nothing."""
    return {}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of some texts."""

    config: Config
    """In force from now on."""
    changed: frozenset[str] = frozenset()
    """Names of the settings whose value changed."""
    refused: tuple[str, ...] = ()
    """A line for each refused text, for the log."""
    show: Mapping[str, str] = field(default_factory=dict)
    """Files to be written back, name -> text."""
    judged: Mapping[str, str | None] = field(default_factory=dict)
    """The texts that this is about; None where the file was gone.  Holds all names of `show`."""


class _Empty(NamedTuple):
    text: str
    deadline: float


class TreeState:
    """The values in force, and what is wrong with the files.

    After each Outcome its `show` has to be written (FileTree.write_back); the next text of such a
    file, if it is the one shown, is taken for the echo of that.  The caller then publishes
    `errors_text` and `applied_text`.
    """

    __slots__ = ("_check", "_echoes", "_empty", "config", "errors", "generation")

    def __init__(self, config: Config = DEFAULTS, host_check: HostCheck = no_host_check) -> None:
        self.config = config
        self.generation = 1
        """Counts the changes of config."""
        self.errors: dict[str, str] = {}
        """Name -> line, of the files whose last text was refused."""
        self._check = host_check
        self._empty: dict[str, _Empty] = {}
        self._echoes: dict[str, str] = {}

    def written(self, texts: Mapping[str, str | None], now: float) -> Outcome:
        """Judge files that were closed after writing or moved into place; None: the file is gone.

        `now` is in seconds, monotonic.  Names that are no settings are ignored.
        """
        judged = {name: texts[name] for name in SETTINGS if name in texts}
        complete: dict[str, str] = {}
        for name, text in judged.items():
            empty, echo = self._empty.pop(name, None), self._echoes.pop(name, None)
            if text is None or text == echo:
                continue
            if text.strip(BLANKS):
                complete[name] = text
            else:
                self._empty[name] = _Empty(text, empty.deadline if empty else now + EMPTY_GRACE)
        gone = {name for name, text in judged.items() if text is None}
        return self._settle(complete, judged, gone)

    def shown(self, name: str) -> str:
        """The text of the value in force, for a file that is written now, later than was told.

        Its next text, if it is this one, is the echo.
        """
        text = in_force(name, self.config) + "\n"
        self._echoes[name] = text
        return text

    def next_deadline(self) -> float | None:
        """When `on_time` has something to do; None if not before the next write."""
        return min((empty.deadline for empty in self._empty.values()), default=None)

    def on_time(self, now: float) -> Outcome:
        """Refuse what has been empty for too long."""
        late = {name: self._empty[name] for name in SETTINGS if name in self._empty}
        texts = {name: empty.text for name, empty in late.items() if empty.deadline <= now}
        for name in texts:
            del self._empty[name]
        return self._settle(texts, texts)

    def _settle(
        self,
        texts: Mapping[str, str],
        judged: Mapping[str, str | None],
        gone: frozenset[str] | set[str] = frozenset(),
    ) -> Outcome:
        values: dict[str, Any] = {}
        reasons: dict[str, str] = {}
        for name, text in texts.items():
            try:
                values[name] = parse(name, text)
            except SettingRefused as reason:
                reasons[name] = str(reason)
        changed = self._apply(values, reasons)

        for name in texts:
            self.errors.pop(name, None)
        lines = {
            name: f"{name}: {reasons[name]}; {in_force(name, self.config)} stays in force"
            for name in texts
            if name in reasons
        }
        self.errors |= lines
        show = {
            name: in_force(name, self.config) + "\n"
            for name in judged
            if name in gone
            or name in reasons
            or (name in texts and _untidy(name, texts[name], values))
        }
        self._echoes |= show
        return Outcome(self.config, changed, tuple(lines.values()), show, judged)

    def _apply(self, values: Mapping[str, Any], reasons: dict[str, str]) -> frozenset[str]:
        """Put in force what the rules allow; the reasons of the rest are added to `reasons`."""
        before = self.config
        waiting = {
            name: value
            for name, value in values.items()
            if value != getattr(before, SETTINGS[name].field)
        }
        config, together = self._try(before, waiting)
        # Not all together: then one by one, and again, since one may fit what was taken after it.
        refused: dict[str, str] = {}
        progress = bool(together)
        while progress:
            progress, refused = False, {}
            for name in list(waiting):
                config, blamed = self._try(config, {name: waiting[name]})
                if blamed:
                    refused[name] = blamed.get(name) or next(iter(blamed.values()))
                else:
                    del waiting[name]
                    progress = True
        reasons |= refused
        if config != before:
            self.config = config
            self.generation += 1
        return frozenset(n for n, s in SETTINGS.items() if _differ(before, config, s.field))

    def _try(self, old: Config, values: Mapping[str, Any]) -> tuple[Config, Mapping[str, str]]:
        """The config with these values, or the old one and which value is to blame."""
        if not values:
            return old, {}
        names = frozenset(values)
        fields = {SETTINGS[name].field: value for name, value in values.items()}
        new = replace(old, **fields)
        blamed = conflicts(new, names) or self._check(old, new, names)
        return (old, blamed) if blamed else (new, {})


def _differ(one: Config, other: Config, name: str) -> bool:
    return bool(getattr(one, name) != getattr(other, name))


def _untidy(name: str, text: str, values: Mapping[str, Any]) -> bool:
    return text.strip(BLANKS) != render(name, values[name])


def applied_text(config: Config, generation: int) -> str:
    """The text of status/applied: `generation=7`, then `key=value` lines; keys are the names."""
    lines = [f"generation={generation}", *(f"{name}={in_force(name, config)}" for name in SETTINGS)]
    return "\n".join(lines) + "\n"


def errors_text(errors: Mapping[str, str]) -> str:
    """The text of status/errors: a line a file, in the order of SETTINGS; empty if all is well."""
    return "".join(errors[name] + "\n" for name in SETTINGS if name in errors)
