"""The archive is read back by another program."""

import os
import shutil
import subprocess

import pytest

from krelay_vm import cpio
from krelay_vm.cpio import Entry

FILES = [
    Entry("bin", cpio.FOLDER),
    Entry("bin/program", cpio.PROGRAM, b"#!/bin/sh\n"),
    Entry("text", cpio.FILE, b"12345"),
    Entry("empty", cpio.FILE),
]


def test_every_entry_begins_at_a_multiple_of_four() -> None:
    archive = cpio.archive([*FILES, Entry("null", cpio.CHARACTER_DEVICE, device=(1, 3))])

    at = 0
    names = []
    while True:
        assert at % 4 == 0
        head = archive[at : at + 110]
        assert head.startswith(b"070701")
        size, length = int(head[54:62], 16), int(head[94:102], 16)
        name = archive[at + 110 : at + 110 + length]
        names.append(name.rstrip(b"\0").decode())
        if names[-1] == "TRAILER!!!":
            break
        if names[-1] == "null":
            assert (head[78:86], head[86:94]) == (b"00000001", b"00000003")
        at += -(-(110 + length) // 4) * 4 + -(-size // 4) * 4
    assert names == ["bin", "bin/program", "text", "empty", "null", "TRAILER!!!"]


@pytest.mark.skipif(not os.path.exists("/bin/busybox"), reason="needs busybox, which reads cpio")
def test_another_program_unpacks_it(tmp_path: os.PathLike[str]) -> None:
    busybox = shutil.which("busybox") or "/bin/busybox"
    subprocess.run(
        [busybox, "cpio", "-idm"],
        input=cpio.archive(FILES),
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )

    folder = os.fspath(tmp_path)
    with open(f"{folder}/text", "rb") as file:
        assert file.read() == b"12345"
    assert os.stat(f"{folder}/bin/program").st_mode == 0o100755
    assert os.path.getsize(f"{folder}/empty") == 0
