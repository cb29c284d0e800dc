"""Modules come after those they need."""

import pytest

from krelay_vm import kmod


def module(depends: str) -> bytes:
    return b"\x7fELF...\0license=GPL\0depends=" + depends.encode() + b"\0name=x\0"


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (module(""), []),
        (module("nfnetlink"), ["nfnetlink"]),
        (module("x-tables,nf-conntrack"), ["x_tables", "nf_conntrack"]),
        (b"no such section", []),
    ],
)
def test_a_module_says_what_it_needs(contents: bytes, expected: list[str]) -> None:
    assert kmod.depends(contents) == expected


def test_each_module_comes_once_and_after_those_it_needs() -> None:
    needs = {"a": ["b", "c"], "b": ["d"], "c": ["d"], "d": [], "e": ["d", "builtin"]}

    assert kmod.order(["a", "e", "missing"], needs) == ["d", "b", "c", "a", "e"]


def test_libcrc32c_gets_what_it_does_not_name() -> None:
    needs = {"nf_tables": ["libcrc32c"], "libcrc32c": [], "crc32c_generic": []}

    assert kmod.order(["nf_tables"], needs) == ["crc32c_generic", "libcrc32c", "nf_tables"]
