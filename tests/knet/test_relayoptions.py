"""The options that both programs have: which texts are values, and what the help says."""

import argparse
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knet import relayoptions
from knet.relayoptions import MAX_HOLD, MAX_WORKERS, add_options, seconds, size, workers


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", 1),
        ("4096", 4096),
        ("64K", 65536),
        ("64k", 65536),
        ("1M", 1 << 20),
        ("64M", MAX_HOLD),
    ],
)
def test_a_size_is_a_number_of_bytes_or_of_k_or_m(text: str, value: int) -> None:
    assert size(text) == value


@given(count=st.integers(1, MAX_HOLD))
def test_any_size_up_to_the_greatest_can_be_asked_for(count: int) -> None:
    assert size(str(count)) == count
    assert size(f"{count}K") == count << 10 if count << 10 <= MAX_HOLD else True


NO_SIZE = ["", "K", "0", "0K", "-1", "1.5M", "1G", "1KK", "1 K", "65M", "\u0663", "99999999999"]
NO_SECONDS = ["", "soon", "-1", "nan", "inf", "1e99", "2592001", "1,5"]
NO_WORKERS = ["", "0", "-1", "1.5", "many", str(MAX_WORKERS + 1), "\u0663"]


@pytest.mark.parametrize(
    ("read", "text"),
    [
        *((size, text) for text in NO_SIZE),
        *((seconds, text) for text in NO_SECONDS),
        *((workers, text) for text in NO_WORKERS),
    ],
)
def test_what_is_no_value_is_refused_in_words(read: Callable[[str], object], text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a ") as refusal:
        read(text)
    assert repr(text) in str(refusal.value)


@given(text=st.text(max_size=8))
def test_any_text_is_a_value_or_refused(text: str) -> None:
    for read in (size, seconds, workers):
        try:
            value = read(text)
        except argparse.ArgumentTypeError:
            continue
        assert value >= 0


@pytest.mark.parametrize("option", ["--stall", "--half-close", "--connect-timeout"])
def test_a_limit_of_nothing_would_end_everybody_and_is_refused(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        parser().parse_args([option, "0"])
    assert ending.value.code == 2
    assert f"argument {option}: '0' is not a number of seconds from 0.01 up" in (
        capsys.readouterr().err
    )


def test_the_help_tells_every_default() -> None:
    text = " ".join(parser().format_help().split())
    for default in ("(512K)", "(10)", "(3600)", "(30)", "(1)"):
        assert default in text
    assert relayoptions.__doc__
