"""What people see, in a terminal and in a pipe."""

import io
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from knet.terminal import console, show
from krelay.cli.tables import Rates, listing, nat_table, trace_line, watch_table
from krelay.control.views import flow_values
from krelay.nat.flow import Timeouts
from tests.krelay.control.test_commands import relay

COLUMNS = [
    "id",
    "proto",
    "state",
    "client",
    "service",
    "gport",
    "relay",
    "server",
    "source",
    "age",
    "idle",
    "expires",
    "packets",
    "bytes",
]
WIDEST: dict[str, Any] = {
    "id": 1234567890,
    "proto": "tcp",
    "state": "established",
    "client": "192.168.100.100:40000",
    "service": "192.168.100.101:65535",
    "gport": 65535,
    "relay": "192.168.100.101:45678",
    "server": "192.168.100.102:65535",
    "source": "client",
    "age": 604800.1,
    "idle": 604800.2,
    "expires": 604800.3,
    "packets": [123456789012, 123456789013],
    "bytes": [123456789012345, 123456789012346],
}
TRACE = "T1 10.0.0.1:40000 > 192.168.0.2:80 [S] => > 192.168.0.2:16000 flow 17"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that could show colours; nobody has asked for them by force, or against them."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def printed(shown: object, capsys: pytest.CaptureFixture[str]) -> str:
    """As it comes out of a pipe."""
    if isinstance(shown, Table):
        show(console(), shown)
    else:
        console().print(shown, soft_wrap=True)
    return capsys.readouterr().out


def in_terminal(shown: object) -> str:
    out = io.StringIO()
    Console(file=out, force_terminal=True, color_system="standard", width=300).print(shown)
    return out.getvalue()


def test_the_table_has_the_columns_of_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    fake = relay()
    rows = [flow_values(row, Timeouts(), 103.2) for row in fake.nat]
    text = printed(nat_table(rows), capsys)
    head, *lines = (line.split() for line in text.splitlines() if line.strip(" ─"))

    assert head == COLUMNS
    assert [" ".join(line) for line in lines[:2]] == [
        "1 tcp established 10.0.0.1:40000 192.168.0.2:80 16000 192.168.0.2:45678 "
        "192.168.0.1:80 client 3.2 0.1 7439.9 12/10 2210/9931",
        "2 udp unreplied 10.0.0.9:4000 192.168.0.2:53 192.168.0.1:53 relay 2.2 2.2 17.8 1/0 60/0",
    ]
    assert set(rows[0]) == set(COLUMNS)


def test_nothing_of_the_widest_row_is_lost_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(nat_table([WIDEST]), capsys)

    for value in WIDEST.values():
        cell = "/".join(map(str, value)) if isinstance(value, list) else str(value)
        assert cell in text.split()


@pytest.mark.parametrize(
    "shown",
    [nat_table([WIDEST]), listing({"state": "running", "T1": 3}), trace_line(TRACE)],
    ids=["table", "listing", "trace"],
)
def test_there_are_colours_in_a_terminal_and_none_in_a_pipe(
    shown: object, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "\x1b[" in in_terminal(shown)
    assert "\x1b" not in printed(shown, capsys)


def test_a_listing_is_a_name_and_a_value_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(listing({"state": "failed: no", "flows_tcp": 3, "queue": [1, 2]}), capsys)

    assert [line.split(None, 1) for line in map(str.rstrip, text.splitlines())] == [
        ["state", "failed: no"],
        ["flows_tcp", "3"],
        ["queue", "1/2"],
    ]


def test_a_failure_is_red_and_running_is_green() -> None:
    assert "31mfailed: no" in in_terminal(listing({"state": "failed: no"}))
    assert "32mrunning" in in_terminal(listing({"state": "running"}))


def test_what_looks_like_markup_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert "[bold]x[/]" in printed(listing({"state": "[bold]x[/]"}), capsys)
    assert printed(trace_line(TRACE), capsys) == f"{TRACE}\n"


def rows(*moved: tuple[int, int]) -> list[dict[str, Any]]:
    """Rows whose ends have sent so many bytes."""
    return [WIDEST | {"id": number, "bytes": [*each]} for number, each in enumerate(moved, 1)]


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (1000, "id proto state client service gport relay server source age idle expires packets "
               "bytes bytes/s"),
        (80, "id state client bytes bytes/s"),
        (100, "id state client service bytes bytes/s"),
        (10, "id state client bytes"),
    ],
)  # fmt: skip
def test_where_there_is_little_room_the_least_important_columns_go_first(
    width: int, columns: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = watch_table([WIDEST], Rates(), width, 25)
    head, *_ = printed(table, capsys).splitlines()

    assert head.split() == columns.split()
    assert width < 80 or len(head) <= width


def test_the_busiest_flows_come_first_and_their_rates_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    rates = Rates()
    rates.seen(rows((0, 0), (0, 5000), (7, 7)), 10.0)
    now = [*rows((0, 500), (4000, 3_405_000), (7, 7)), WIDEST | {"id": 9}]
    rates.seen(now, 12.0)
    lines = printed(watch_table(now, rates, 80, 25), capsys).splitlines()

    assert [line.split()[0] for line in lines[1:]] == ["2", "1", "3", "9"]
    assert lines[1].split()[-2:] == ["4.0k/3.4M", "2.0k/1.7M"]
    assert lines[2].split()[-2:] == ["0/500", "0/250"]
    assert lines[4].split()[-1] == "123T/123T", "its rate isn't known yet"


@pytest.mark.parametrize(("height", "shown", "more"), [(12, 10, ""), (11, 8, "and 2 more")])
def test_what_no_line_is_left_for_is_counted(
    height: int, shown: int, more: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = watch_table(rows(*[(0, 0)] * 10), Rates(), 80, height)
    lines = [line.strip() for line in printed(table, capsys).splitlines()]

    assert len(lines) <= height
    assert len([line for line in lines if line.startswith(tuple("123456789"))]) == shown
    assert lines[-1] == more or not more
