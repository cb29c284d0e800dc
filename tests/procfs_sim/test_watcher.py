"""The real inotify: each way to write is seen, only whole texts are read, own writes are known."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from procfs_sim.ondisk import FileTree
from procfs_sim.state import Outcome
from procfs_sim.tree import STATUS
from procfs_sim.watcher import TreeWatcher
from tests.procfs_sim.helpers import BOUND, Keeper, mode, shell, wait_for
from tests.tools.hours import garbage
from tests.tools.nobody import as_nobody, needs_root, open_directory


def test_a_watcher_without_a_tree_says_so_and_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))

    with pytest.raises(FileNotFoundError):
        TreeWatcher(tmp_path / "krelay")

    assert len(os.listdir("/proc/self/fd")) == before


WAYS_TO_WRITE = {
    "echo": "echo 17000 > gport",
    "append": ": > gport; echo 17000 >> gport",
    "mv": "echo 17000 > elsewhere; mv elsewhere gport",
    "vim": "echo 17000 > 4913; mv gport gport~; mv 4913 gport; rm gport~",
    "vim without rename": "cp gport gport~; echo 17000 > gport; rm gport~",
    "sed -i": "sed -i s/16000/17000/ gport",
    "cp": "echo 17000 > elsewhere; cp elsewhere gport; rm elsewhere",
    "dd in place": "printf 17000 | dd of=gport conv=notrunc status=none",
    "rm and again": "rm gport; echo 17000 > gport",
    "ln -f": "echo 17000 > elsewhere; ln -f elsewhere gport; rm elsewhere",
    "tee": "echo 17000 | tee gport > /dev/null",
    "private mode": "umask 077; echo 17000 > elsewhere; mv elsewhere gport",
}


@pytest.mark.parametrize("command", WAYS_TO_WRITE.values(), ids=WAYS_TO_WRITE)
def test_every_way_to_write_counts(tree: FileTree, keeper: Keeper, command: str) -> None:
    shell(tree, command)

    keeper.settle()

    assert keeper.state.config.gport == 17000
    assert (keeper.differing(), keeper.state.errors) == ({}, {})
    assert mode(tree.root / "gport") == 0o644


WAYS_TO_SPOIL = {
    "echo": "echo abc > gport",
    "rename": "echo abc > elsewhere; mv elsewhere gport",
    "empty": ": > gport",
    "truncate": "truncate -s 0 gport",
    "to a part": "truncate -s 10 gport",
    "binary": "printf '\\377\\000' > gport",
}


@pytest.mark.parametrize("command", WAYS_TO_SPOIL.values(), ids=WAYS_TO_SPOIL)
def test_a_spoilt_file_shows_the_value_in_force_and_an_error(
    tree: FileTree, keeper: Keeper, command: str
) -> None:
    shell(tree, command)

    keeper.settle()

    assert tree.read("gport") == "16000\n"
    assert list(keeper.state.errors) == ["gport"]
    assert keeper.state.generation == 1


@pytest.mark.parametrize("command", ["rm gport", "mv gport away", "rm -r timeouts/*", "rm *"])
def test_what_is_removed_comes_back(tree: FileTree, keeper: Keeper, command: str) -> None:
    shell(tree, command.replace("rm *", "rm -f gport real_ip start services source"))

    keeper.settle()

    assert (keeper.differing(), keeper.state.errors) == ({}, {})


def test_truncate_by_path_which_closes_nothing_is_seen(tree: FileTree, keeper: Keeper) -> None:
    os.truncate(tree.root / "gport", 0)
    keeper.settle()
    assert (tree.read("gport"), list(keeper.state.errors)) == ("16000\n", ["gport"])

    os.truncate(tree.root / "gport", 2)
    keeper.settle()
    assert keeper.state.config.gport == 16


def test_changes_come_in_the_order_of_the_last_events_each_once(
    tree: FileTree, watcher: TreeWatcher
) -> None:
    shell(tree, "echo 1 > start; echo 9 > limits/flows; echo 2 > gport; echo 0 > start; rm source")

    assert list(watcher.changes().items()) == [
        ("limits/flows", "9\n"),
        ("gport", "2\n"),
        ("start", "0\n"),
        ("source", None),
    ]
    assert watcher.changes() == {}


def test_a_half_written_file_is_not_read_because_another_one_changed(
    tree: FileTree, watcher: TreeWatcher
) -> None:
    with (tree.root / "gport").open("w") as writer:
        writer.write("17")
        writer.flush()
        shell(tree, "echo 1 > start")
        assert watcher.changes() == {"start": "1\n"}
        writer.write("000")

    assert watcher.changes() == {"gport": "17000"}


def test_a_file_that_is_open_again_is_read_when_it_is_closed_again(
    tree: FileTree, watcher: TreeWatcher
) -> None:
    shell(tree, "echo 17000 > gport")
    with (tree.root / "gport").open("w") as writer:
        writer.write("18")
        writer.flush()
        assert watcher.changes() == {}
        writer.write("000")

    assert watcher.changes() == {"gport": "18000"}


def test_a_writer_that_takes_its_time_gets_its_text_in_whole(
    tree: FileTree, keeper: Keeper
) -> None:
    shell(tree, "echo abc > gport")
    with (tree.root / "gport").open("w") as writer:
        keeper.settle()
        writer.write("80\n")
        writer.flush()
        keeper.settle()
        assert tree.read("gport") == "80\n"
        writer.seek(0)
        writer.write("81\n")
    keeper.settle()

    assert keeper.state.config.gport == 81
    assert keeper.state.errors == {}


def test_editors_files_beside_are_no_changes(tree: FileTree, watcher: TreeWatcher) -> None:
    shell(tree, "echo 1 > .gport.swp; echo 1 > gport~; mkdir new; echo 1 > new/gport; rm gport~")

    assert watcher.changes() == {}


def test_write_back_is_seen_once_and_then_there_is_peace(tree: FileTree, keeper: Keeper) -> None:
    shell(tree, "echo abc > gport")

    assert keeper.step()
    assert keeper.step()
    assert not keeper.step()
    assert list(keeper.state.errors) == ["gport"]


def test_own_status_is_no_change_but_what_others_do_to_it_is(
    tree: FileTree, watcher: TreeWatcher
) -> None:
    for name in STATUS:
        tree.publish(name, "x\n")
        tree.publish(name, "y\n")
    assert watcher.changes() == {}

    shell(tree, "echo mine > status/state")
    assert watcher.changes() == {"status/state": None}
    shell(tree, "rm status/applied; echo mine > t; mv t status/errors")
    assert watcher.changes() == {"status/applied": None, "status/errors": None}
    tree.publish("status/state", "x\n")
    assert watcher.changes() == {}


def test_after_an_overflow_everything_is_told_but_what_is_half_written(
    tree: FileTree, watcher: TreeWatcher
) -> None:
    room = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if room > 100_000:
        pytest.skip(f"the queue of inotify holds {room} events here")
    for turn in range(room // 2 + 1):  # each a modification and a close, never two alike in a row
        (tree.root / "status" / f"x{turn % 2}").write_text("x")
    shell(tree, "echo 17000 > gport")

    with (tree.root / "start").open("w"):
        told = watcher.changes()

    expected = tree.read_all() | dict.fromkeys(STATUS)
    del expected["start"]
    assert told == expected
    assert told["gport"] == "17000\n"
    assert watcher.changes() == {"start": ""}


@pytest.mark.parametrize("command", ["rm -r .", "rm -r status", "mv limits l", "mv ../krelay ../x"])
def test_a_tree_that_is_gone_is_noticed(tree: FileTree, watcher: TreeWatcher, command: str) -> None:
    assert not watcher.gone
    shell(tree, "echo 1 > start")
    watcher.changes()
    assert not watcher.gone

    shell(tree, command.replace("rm -r .", "rm -r ../krelay"))
    watcher.changes()

    assert watcher.gone


def test_changes_never_wait_and_a_closed_watcher_leaves_no_descriptor(tree: FileTree) -> None:
    before = len(os.listdir("/proc/self/fd"))

    with TreeWatcher(tree.root) as watcher:
        assert watcher.changes() == {}

    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    "texts",
    [["abc\n", "17000\n"], ["", "99", "x"], ["80\n", "1\n", "123456\n"]],
    ids=["bad and good", "empty and bad", "refused by rules"],
)
def test_a_hammering_writer_and_the_keeper_agree_in_the_end(
    tree: FileTree, keeper: Keeper, texts: list[str]
) -> None:
    def hammer() -> None:
        for turn in range(200):
            (tree.root / "gport").write_text(texts[turn % len(texts)])
        (tree.root / "gport").write_text("4242\n")

    user = threading.Thread(target=hammer)
    user.start()
    while user.is_alive():
        keeper.step(timeout=0.01)
    user.join(BOUND)
    keeper.settle()

    assert keeper.differing() == {}
    assert keeper.state.config.gport == 4242
    assert keeper.state.errors == {}


@needs_root
def test_who_may_only_read_does_not_know_of_writers_and_waits_for_their_close() -> None:
    with open_directory(0o1777) as directory:
        tree = FileTree(directory / "tree")
        tree.create()
        with (tree.root / "gport").open("a"):
            assert as_nobody(lambda: tree.has_writer("gport")) == "None"

        def follow() -> tuple[dict[str, str | None], ...]:
            with TreeWatcher(tree.root) as watcher:
                (directory / "go").touch()
                wait_for(lambda: (directory / "half").exists())
                first = watcher.changes()
                (directory / "on").touch()
                then: dict[str, str | None] = {}

                def has_come() -> bool:
                    then.update(watcher.changes())
                    return bool(then)

                wait_for(has_come)
                return first, then

        def write() -> None:  # he must have no copy of the descriptor
            wait_for(lambda: (directory / "go").exists())
            with (tree.root / "gport").open("w") as writer:
                writer.write("17")
                writer.flush()
                (directory / "half").touch()
                wait_for(lambda: (directory / "on").exists())
                writer.write("000")

        user = threading.Thread(target=write)
        user.start()
        said = as_nobody(follow)
        user.join(BOUND)
    assert said == "({}, {'gport': '17000'})"


def test_what_fails_for_hours_leaves_nothing_for_the_collector(
    tree: FileTree, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    wrong = Outcome(keeper.state.config, judged={"gport": "70000\n"}, show={"gport": "18000"})
    shell(tree, "echo 18000 > gport")
    monkeypatch.setattr(FileTree, "read", fails)
    monkeypatch.setattr(FileTree, "show_if", fails)

    def hours() -> None:
        for _ in range(100):
            keeper.watcher.changes()
            assert keeper.tree.write_back(wrong)["gport"].errno == errno.EIO
        kept = keeper.watcher.unread["gport"]
        assert (kept.errno, kept.__traceback__, kept.__context__) == (errno.EIO, None, None)

    hours()
    assert garbage(hours) == {}


def test_no_program_is_run_to_find_libc(tree: FileTree) -> None:
    code = (
        "import ctypes.util; ctypes.util.find_library = None\n"
        "from pathlib import Path\n"
        "from procfs_sim.watcher import TreeWatcher\n"
        f"with TreeWatcher(Path({str(tree.root)!r})): print('watches')"
    )
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True)

    assert (done.stdout, done.stderr) == ("watches\n", "")
