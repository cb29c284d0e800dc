"""DNS and HTTP through the relay, between machines and by a machine, each combination once."""

import pytest

from tests.vm.crossing import COMBINATIONS, PARTS, cross

BOTH = [("uml", "qemu")]
"""The one relay of these whose rules aren't those of tests/net is tried with both data paths."""


def marks(*backends: str) -> pytest.MarkDecorator:
    return pytest.mark.qemu if "qemu" in backends else pytest.mark.vm


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ends", "relay", "datapath"),
    [
        pytest.param(ends, relay, datapath, marks=marks(ends, relay))
        for ends, relay in COMBINATIONS
        for datapath in (("auto", "queue") if (ends, relay) in BOTH else ("auto",))
    ],
)
def test_machines_talk_through_the_relay_and_its_files_steer_it(
    ends: str, relay: str, datapath: str
) -> None:
    assert list(cross(ends, relay, datapath)) == list(PARTS)
