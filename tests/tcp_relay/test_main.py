"""The command line: what it refuses, and in which words."""

import pytest

from tcp_relay.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], "'0' is not a number from 1 to 256"),
        (["--buffer", "1G"], "'1G' is not a size from 1 to 64M"),
        (["--stall", "-1"], "'-1' is not a number of seconds"),
        (["--log-level", "loud"], "invalid choice"),
        (["16000"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_said_in_words(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ending:
        main(arguments)
    assert ending.value.code == 2
    assert words in capsys.readouterr().err


def test_help_shows_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ending:
        main(["--help"])
    assert ending.value.code == 0
    assert "example:\n  tcp-relay --root" in capsys.readouterr().out
