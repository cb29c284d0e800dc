"""The reference pages are fresh, and whatever they list has a sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

from krelay.control.metrics import COUNTERS
from krelay.datapath.reasons import Reason
from procfs_sim.tree import SETTINGS
from tools.reference import counters, events, markdown, settings, sockets
from tools.reference.markdown import NoSentence, agree, sentences
from tools.reference.pages import filled, made

ROOT = Path(__file__).parents[1]


def test_pages_are_fresh() -> None:
    stale = [page.name for page, text in made() if page.read_text() != text]

    assert not stale, "run `make reference`"


def test_each_setting_and_counter_is_listed() -> None:
    assert all(f"| `{name}` |" in settings.settings() for name in SETTINGS)
    assert all(f"| `{metric.name}` |" in counters.counters() for metric in COUNTERS)
    assert all(metric.sentence.endswith(".") for metric in COUNTERS)


def test_each_reason_is_listed() -> None:
    assert all(f"| `{reason}` |" in counters.reasons() for reason in Reason)
    assert all(reason.sentence.endswith(".") for reason in Reason)


def test_events_are_found() -> None:
    found = {(event.program, event.message): event for event in events.events()}

    assert found["krelay", "value applied"].fields == ("file", "value", "generation")
    assert found["tcp-relay and tcpproxy", "connection refused"].level == "info"  # one of two
    assert "error" in found["krelay", "a call failed; going on"].fields  # through Failures.tell
    assert ("all programs", "too many connections") in found  # through a method of the class


@pytest.mark.parametrize(
    ("named", "have", "why"),
    [
        (["a", "b"], {"a": "A."}, "no sentence for 'b'"),
        (["a"], {"a": "A.", "b": "B."}, "a sentence for 'b', which there isn't"),
    ],
)
def test_sentence_too_few_or_too_many_is_noticed(
    named: list[str], have: dict[str, str], why: str
) -> None:
    with pytest.raises(NoSentence, match=why):
        agree("things", named, have)


@pytest.mark.parametrize(
    ("section", "make"),
    [
        ("settings", settings.settings),
        ("tree", settings.others),
        ("control", sockets.control),
        ("relay", sockets.requests),
        ("log", events.tables),
    ],
)
def test_each_table_needs_its_sentences(
    section: str, make: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert callable(make)
    lacking = {**sentences(), section: {}}
    for module in (settings, sockets, events):
        monkeypatch.setattr(module, "sentences", lambda: lacking)

    with pytest.raises(NoSentence):
        make()


def test_every_sentence_is_one() -> None:
    def walk(value: object, name: str) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                walk(each, f"{name} {key}")
        else:
            assert isinstance(value, str)
            assert value.endswith((".", "?")), name

    walk(markdown.sentences(), "")


def test_a_page_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no place for x"):
        filled("nothing", "x", "new")


def test_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", exc_type=ImportError)
    pytest.importorskip("myst_parser", exc_type=ImportError)
    options = ["-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "doctrees")]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, "docs", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )

    assert done.returncode == 0, done.stderr
    assert "T3 relay to server" in (tmp_path / "site/internals/steps.html").read_text()
