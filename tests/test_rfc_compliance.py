"""The page on requirements names tests: each of them exists."""

import re
from pathlib import Path

HERE = Path(__file__).parent
PAGE = (HERE.parent / "docs/rfc-compliance.md").read_text()
ROW = re.compile(r"^\| (?!requirement|---)(.*?) \| (.*?) \| (.*?) ?\| (.*?) ?\|$", re.MULTILINE)
STATES = ("met", "not met", "not applicable")


def rows() -> list[tuple[str, str, str, str]]:
    """Requirement, state, how, tests."""
    return ROW.findall(PAGE)


def test_every_row_has_a_state_and_every_met_one_a_test() -> None:
    assert rows()
    for requirement, state, _, tests in rows():
        assert state.startswith(STATES), requirement
        assert tests or not state.startswith("met"), requirement


def test_every_test_that_is_named_exists() -> None:
    named = 0
    for requirement, _, _, tests in rows():
        file = ""
        for name in filter(None, tests.split(", ")):
            if name == "the same":
                continue
            if "::" in name:
                file, _, name = name.partition("::")
            named += 1
            assert f"def {name}(" in (HERE / file).read_text(), f"{requirement}: {file}::{name}"
    assert named
