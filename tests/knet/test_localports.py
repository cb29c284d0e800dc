"""The list of reserved ports, as the kernel writes it."""

import pytest

from knet.localports import reserved


@pytest.mark.parametrize(
    ("text", "ports"),
    [
        ("\n", set()),
        ("80\n", {80}),
        ("8080,9148-9150\n", {8080, 9148, 9149, 9150}),
        ("1-65535", set(range(1, 65536))),
    ],
)
def test_reserved_ports_are_read_as_the_kernel_writes_them(text: str, ports: set[int]) -> None:
    assert reserved(text) == ports


@pytest.mark.parametrize("text", ["x", "1 2", "1-2-3", "40000\t40001\n"])
def test_what_is_no_list_of_ports_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        reserved(text)
