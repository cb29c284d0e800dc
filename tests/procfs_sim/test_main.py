"""`python -m procfs_sim`."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from procfs_sim.__main__ import main
from procfs_sim.ondisk import FileTree
from procfs_sim.tree import ROOT_VARIABLE, SETTINGS


def test_the_table_has_a_line_for_each_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = FileTree(tmp_path)
    tree.create()
    (tmp_path / "gport").write_text("abc\n")
    (tmp_path / "services").write_text("tcp/80\nudp/53\n")
    (tmp_path / "start").unlink()

    assert main(["--root", str(tmp_path)]) == 0

    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["file", "value", "accepted"]
    assert [line.split()[0] for line in lines] == list(SETTINGS)
    assert "'abc' (not accepted)" in lines[0]
    assert "(missing)" in lines[2]
    assert "tcp/80 udp/53 " in lines[3]
    column = head.index("accepted")
    assert [line[column:] for line in lines] == [s.accepted for s in SETTINGS.values()]


def test_the_root_may_come_from_the_environment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    FileTree(tmp_path).create()
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))

    assert main([]) == 0
    assert "16000" in capsys.readouterr().out


def test_no_tree_is_one_line_that_says_what_to_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--root", str(tmp_path / "none")]) == 1

    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"error: there is no tree at {tmp_path}/none; start krelay, or name its tree by --root\n"
    )


def test_wrong_usage_is_exit_status_2_and_help_shows_an_example(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as wrong:
        main(["--rot", "x"])
    with pytest.raises(SystemExit) as fine:
        main(["--help"])

    assert (wrong.value.code, fine.value.code) == (2, 0)
    assert "example: python -m procfs_sim --root" in capsys.readouterr().out


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    FileTree(tmp_path).create()
    command = f"{shlex.quote(sys.executable)} -m procfs_sim --root {tmp_path} | true"

    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=30)

    assert (done.returncode, done.stderr) == (0, "")
