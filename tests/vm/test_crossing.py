"""DNS and HTTP through the relay, between machines and by a machine, each combination once."""

import pytest

from tests.vm.crossing import COMBINATIONS, PARTS, cross


def marks(*backends: str) -> pytest.MarkDecorator:
    return pytest.mark.qemu if "qemu" in backends else pytest.mark.vm


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("ends", "relay"), [pytest.param(*pair, marks=marks(*pair)) for pair in COMBINATIONS]
)
def test_machines_talk_through_the_relay_and_its_files_steer_it(ends: str, relay: str) -> None:
    assert list(cross(ends, relay)) == list(PARTS)
