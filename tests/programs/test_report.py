"""The page: every way is accounted for, and a failure can't hide."""

import json
from dataclasses import replace

from tests.programs.report import Row, as_json, page
from tests.programs.table import Client, Server
from tests.programs.ways import Run, Way, ways

CLIENT = Client("asks", "asker", "server", "tcp", "ask $TO", (r"yes",), note="a note")
SERVER = Server("server", ("tcp/7",), "serve")
VERSIONS = {"asker": "1:2.3-4", "server": "5.6+dfsg-1"}
GOOD = Run(0, 0.1, ("yes",), packets=4)
BAD = replace(GOOD, found=(None,))
WAYS = [way for way in ways(("queue", "auto"), ("client", "relay")) if way.kind != "relayed"]
ALL_GOOD = Row(CLIENT, SERVER, VERSIONS, GOOD, dict.fromkeys(WAYS, GOOD))
ONE_BAD = replace(
    ALL_GOOD, runs={**dict.fromkeys(WAYS, GOOD), Way("forwarded", "auto", "relay"): BAD}
)


def line(flow: Row) -> str:
    """Its line of the page."""
    return page([flow], "Here.").split("|---|")[-1].splitlines()[1]


def test_a_program_that_went_as_directly() -> None:
    assert ALL_GOOD.is_as_expected
    assert line(ALL_GOOD) == "| asks (2.3) | server (5.6) | 4 of 4 | 4 of 4 |  | a note |"
    assert "1 of 1 programs went in all ways as they do directly. Here." in page(
        [ALL_GOOD], "Here."
    )


def test_a_way_that_failed_is_named_with_its_reason() -> None:
    assert not ONE_BAD.is_as_expected
    assert line(ONE_BAD) == (
        "| asks (2.3) | server (5.6) | 4 of 4 | 3 of 4 |  "
        "| forwarded auto relay: status 0, and no match for yes; a note |"
    )
    assert "0 of 1 programs" in page([ONE_BAD], "Here.")


def test_a_failure_that_is_known_is_told_with_its_reason() -> None:
    client = replace(CLIENT, fails="its answers come from elsewhere")
    known = replace(ALL_GOOD, client=client, runs=dict.fromkeys(WAYS, BAD))

    assert known.is_as_expected
    assert not replace(ONE_BAD, client=client).is_as_expected  # all ways were to fail
    assert "| fails: its answers come from elsewhere; a note |" in line(known)
    assert "0 of 1 programs" in page([known], "Here.")


def test_a_failure_may_be_known_of_some_ways() -> None:
    client = replace(CLIENT, fails="its server is choosy", fails_in=("relay",))
    runs = {way: BAD if way.source == "relay" else GOOD for way in WAYS}
    known = replace(ALL_GOOD, client=client, runs=runs)
    more = replace(known, runs={**runs, WAYS[0]: BAD})

    assert known.is_as_expected
    assert "| 2 of 4 | 2 of 4 |  | fails: its server is choosy; a note |" in line(known)
    assert not more.is_as_expected
    assert "choosy; terminated queue client: status 0, and no match for yes; a note" in line(more)


def test_a_failure_that_is_known_and_gone_is_no_longer_expected() -> None:
    assert not replace(ALL_GOOD, client=replace(CLIENT, fails="its answers")).is_as_expected


def test_what_fails_directly_proves_nothing() -> None:
    flow = replace(ALL_GOOD, direct=BAD, runs={})

    assert not flow.is_as_expected
    assert "|  |  |  | fails directly: status 0, and no match for yes |" in line(flow)


def test_what_was_not_tried_is_said() -> None:
    flow = Row(CLIENT, SERVER, {"server": "5.6"}, untried="needs asker")

    assert (
        line(flow) == "| asks (missing) | server (5.6) |  |  |  | not tried: needs asker; a note |"
    )
    assert "0 of 0 programs" in page([flow], "Here.")


def test_cells_keep_to_their_columns() -> None:
    flow = replace(ALL_GOOD, client=replace(CLIENT, note="a|b\nc"))

    assert line(flow).endswith("| a\\|b c |")


def test_the_json_has_every_run() -> None:
    (found,) = json.loads(json.dumps([as_json(ONE_BAD)]))

    assert not found["as_expected"]
    assert len(found["ways"]) == len(WAYS)
    assert [way["trouble"] for way in found["ways"] if way["trouble"]] == [
        "status 0, and no match for yes"
    ]
