"""What a run through the relay is worth beside one without it."""

from dataclasses import replace

import pytest

from tests.programs.table import Client, Server
from tests.programs.ways import Run, Way, read, services, slower, unlike, ways, wrong

CLIENT = Client(
    "asks", "asker", "server", "tcp", "ask $TO", (r"^from +$TO$", r"^\d+ bytes"), (r"lost \d+",)
)  # fmt: skip
SAID = "from  10.0.0.1\r\n1234 bytes in 0.1 s\n"
DIRECT = read(CLIENT, "10.0.0.1", 0, 0.1, SAID)
RELAYED = replace(read(CLIENT, "10.9.9.9", 0, 0.1, SAID.replace("10.0.0.1", "10.9.9.9")), packets=3)


def test_all_ways_are_taken_once() -> None:
    found = list(ways(("queue", "auto"), ("client", "relay")))

    assert len(found) == len(set(found)) == 12
    assert [way.kind for way in found[::4]] == ["terminated", "forwarded", "relayed"]


def test_tcp_is_forwarded_where_that_is_tried() -> None:
    server = Server("server", ("tcp/22", "tcp/220-229", "udp/22"), "serve")

    assert services(server, "terminated") == "tcp/22! tcp/220-229 udp/22"
    assert services(server, "forwarded") == "tcp/22=forward! tcp/220-229=forward udp/22"
    assert services(server, "relayed") == services(server, "terminated")


def test_the_address_that_was_asked_is_no_difference() -> None:
    assert DIRECT.found == ("from TO", "1234 bytes")
    assert unlike(CLIENT, DIRECT, RELAYED) is None


@pytest.mark.parametrize("address", ["110.0.0.1", "10.0.0.12", "1.10.0.0.1"])
def test_an_address_that_begins_or_ends_alike_is_another(address: str) -> None:
    run = read(CLIENT, "10.0.0.1", 0, 0.1, f"from {address}\n1 bytes\n")

    assert run.found == (None, "1 bytes")


def test_a_full_stop_after_the_address_is_none_of_it() -> None:
    assert "TO." in read(CLIENT, "10.0.0.1", 0, 0.1, "asked 10.0.0.1.\n").said


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replace(RELAYED, status=None), "no end within 20 s"),
        (replace(RELAYED, status=1), "status 1 instead of 0"),
        (replace(RELAYED, found=("from TO", None)), r"status 0, and no match for ^\d+ bytes"),
        (replace(RELAYED, found=("from TO", "9 bytes")), "'9 bytes' instead of '1234 bytes'"),
        (replace(RELAYED, lost=("lost 3",)), "lost 3"),
        (replace(RELAYED, packets=0), "no packet of it went through the relay"),
        (replace(RELAYED, packets=None), "no packet of it went through the relay"),
    ],
)
def test_what_differs_is_told(change: Run, reason: str) -> None:
    assert unlike(CLIENT, DIRECT, change) == reason


def test_a_loss_counts_directly_too() -> None:
    assert wrong(CLIENT, DIRECT) is None
    assert wrong(CLIENT, read(CLIENT, "10.0.0.1", 0, 0.1, SAID + "lost 2 of 9\n")) == "lost 2"


def test_a_status_other_than_0_may_be_right() -> None:
    assert unlike(CLIENT, replace(DIRECT, status=7), replace(RELAYED, status=7)) is None


def test_only_much_slower_is_slower() -> None:
    quick, slow = Way("terminated", "auto", "client"), Way("terminated", "queue", "client")
    runs = {quick: RELAYED, slow: replace(RELAYED, seconds=4.9)}

    assert slower(replace(DIRECT, seconds=2.0), runs) is None
    assert slower(DIRECT, runs) == "terminated queue client: 4.9 s, directly 0.1 s"
    assert slower(DIRECT, {}) is None


def test_a_way_reads_as_its_words() -> None:
    assert str(Way("forwarded", "auto", "relay")) == "forwarded auto relay"
