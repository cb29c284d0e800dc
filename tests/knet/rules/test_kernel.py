"""What nf_tables tells and does by netlink, in a real kernel."""

import errno
import subprocess
from collections.abc import Iterator

import pytest

from knet.netlink import nftables
from knet.rules import kernel
from krelay_vm import Lab

pytestmark = pytest.mark.net
TABLE = "table ip t {\n chain pre {\n accept\n }\n}\n"


@pytest.fixture(autouse=True)
def relay() -> Iterator[Lab]:
    """A lab in whose relay host this thread is."""
    with Lab() as lab, lab.enter("relay"):
        yield lab


def nft(*words: str, text: str = "") -> str:
    done = subprocess.run(["nft", *words], input=text, capture_output=True, text=True, check=True)
    return done.stdout


def test_a_chain_is_there_or_not() -> None:
    assert kernel.has_chain("t", "pre") is False
    nft("-f", "-", text=TABLE)

    assert kernel.has_chain("t", "pre") is True
    assert kernel.has_chain("t", "post") is False


@pytest.mark.parametrize("number", [errno.EPERM, errno.EINVAL, errno.EPROTONOSUPPORT, errno.EMFILE])
def test_where_the_kernel_does_not_tell_nothing_is_known(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError(number, "")

    monkeypatch.setattr(kernel, "NetlinkSocket", fails)

    assert kernel.has_chain("t", "pre") is None
    assert kernel.has_queue("t")


def test_a_table_goes_with_all_that_is_in_it() -> None:
    nft("-f", "-", text=TABLE.replace("t {", "other {", 1) + TABLE)
    kernel.transaction(nftables.delete_table("t"))

    assert nft("list", "ruleset").split()[:3] == ["table", "ip", "other"]
    with pytest.raises(FileNotFoundError):
        kernel.transaction(nftables.delete_table("t"))


def test_whether_there_is_a_queue_is_what_nft_finds_and_nothing_stays() -> None:
    text = TABLE.replace("accept", "queue num 0")
    done = subprocess.run(["nft", "-f", "-"], input=text, capture_output=True, text=True)
    if not done.returncode:
        nft("delete", "table", "ip", "t")

    assert kernel.has_queue("t") == (done.returncode == 0)
    assert nft("list", "ruleset") == ""
