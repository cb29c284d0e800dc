"""Real files: what shells, editors and careless people do to the tree."""

import fcntl
import os
import re
import signal
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from inotify_simple import INotify

from knet.trust import Untrusted, user
from procfs_sim import files
from procfs_sim.files import MAX_TEXT
from procfs_sim.ondisk import FileTree
from procfs_sim.state import TreeState
from procfs_sim.tree import DEFAULTS, SETTINGS, STATUS, in_force
from procfs_sim.watcher import TreeWatcher
from tests.procfs_sim.helpers import BOUND, Keeper, mode, shell, wait_for
from tests.tools.nobody import Nobody, needs_root, open_directory

# Creating and reading


def test_a_new_tree_has_the_defaults_and_its_modes_whatever_the_umask(tmp_path: Path) -> None:
    tree = FileTree(tmp_path / "run" / "krelay")
    before = os.umask(0o077)
    try:
        tree.create()
        tree.publish("status/state", "stopped\n")
    finally:
        os.umask(before)

    assert tree.read_all() == {n: in_force(n, DEFAULTS) + "\n" for n in SETTINGS}
    assert {mode(tree.root / name) for name in (*SETTINGS, "status/state")} == {0o644}
    assert {mode(tree.root / name) for name in ("", "timeouts", "limits", "status")} == {0o755}


def test_creating_again_honours_what_is_there(tree: FileTree) -> None:
    shell(tree, "echo 17000 > gport; rm start")

    tree.create()

    assert tree.read("gport") == "17000\n"
    assert tree.read("start") == "0\n"


def test_a_tree_that_can_not_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    for root in (tmp_path / "file", tmp_path / "file" / "krelay"):
        with pytest.raises(NotADirectoryError):
            FileTree(root).create()
        assert FileTree(root).read("gport") is None


def test_strange_content_is_text_of_bounded_length(tree: FileTree) -> None:
    (tree.root / "gport").write_bytes(b"\xff\x00" + b"x" * MAX_TEXT)

    text = tree.read("gport")

    assert text is not None
    assert text.startswith("\ufffd\x00x")
    assert len(text) == MAX_TEXT


STRANGE = {
    "a directory": "mkdir gport",
    "a fifo": "mkfifo gport",
    "a symbolic link": "ln -s start gport",
    "a dangling link": "ln -s nowhere gport",
}


OWNER = user(os.geteuid())
NO_FILE = [f"({kind}, owner {OWNER})" for kind in ("a directory", "a FIFO", "a symbolic link")]


@pytest.mark.parametrize("command", STRANGE.values(), ids=STRANGE)
def test_what_is_no_file_reads_as_a_refused_text_and_is_replaced(
    tree: FileTree, keeper: Keeper, command: str
) -> None:
    shell(tree, f"rm gport; {command}")
    assert tree.read("gport") in NO_FILE

    keeper.settle()

    assert keeper.differing() == {}
    assert (tree.root / "gport").is_file()
    assert not (tree.root / "gport").is_symlink()
    assert tree.read("start") == "0\n"


def test_a_directory_with_files_in_it_is_left_alone_without_a_circle(
    tree: FileTree, keeper: Keeper
) -> None:
    shell(tree, "rm gport; mkdir gport; touch gport/mine")

    keeper.settle()

    assert (tree.root / "gport" / "mine").exists()
    assert list(keeper.state.errors) == ["gport"]


# Writing


def test_show_writes_in_place_so_that_an_open_descriptor_stays_valid(tree: FileTree) -> None:
    inode = (tree.root / "real_ip").stat().st_ino
    with (tree.root / "real_ip").open() as reader:
        tree.show("real_ip", "1.1.1.1\n")

        assert reader.read() == "1.1.1.1\n"
    assert (tree.root / "real_ip").stat().st_ino == inode
    tree.show("real_ip", "192.168.100.100\n")
    assert tree.read("real_ip") == "192.168.100.100\n"


def test_show_recreates_what_is_gone(tree: FileTree) -> None:
    shell(tree, "rm gport start; mkdir start")

    tree.show("gport", "17000\n")
    tree.show("start", "1\n")

    assert (tree.read("gport"), tree.read("start")) == ("17000\n", "1\n")


def test_readers_see_the_old_text_or_the_new_one_and_nothing_between(tree: FileTree) -> None:
    texts, seen, stop = ("10.0.0.1\n", "192.168.100.100\n"), set(), threading.Event()

    def read() -> None:
        while not stop.is_set():
            seen.add((tree.root / "real_ip").read_text())
            stop.wait(0.0005)

    reader = threading.Thread(target=read)
    tree.show("real_ip", texts[0])
    reader.start()
    for turn in range(500):
        tree.show("real_ip", texts[turn % 2])
    stop.set()
    reader.join(BOUND)

    assert seen == set(texts)


def test_show_if_leaves_a_newer_text_alone(tree: FileTree, watcher: TreeWatcher) -> None:
    shell(tree, "echo 17000 > gport")
    watcher.changes()

    assert not tree.show_if("gport", "abc\n", "16000\n")

    assert tree.read("gport") == "17000\n"
    assert watcher.changes() == {}


def test_show_if_recreates_what_is_still_gone_only(tree: FileTree) -> None:
    assert not tree.show_if("gport", None, "1\n")
    (tree.root / "gport").unlink()
    assert not tree.show_if("gport", "16000\n", "1\n")
    assert tree.show_if("gport", None, "16000\n")
    assert tree.read("gport") == "16000\n"


def test_show_if_waits_for_a_writer_but_not_for_a_reader(
    tree: FileTree, watcher: TreeWatcher
) -> None:
    with (tree.root / "gport").open("r+"):
        assert tree.has_writer("gport")
        assert not tree.show_if("gport", "16000\n", "1\n")
        assert watcher.changes() == {}
    with (tree.root / "gport").open() as reader:
        assert tree.has_writer("gport") is False
        assert tree.show_if("gport", "16000\n", "1\n")
        assert reader.read() == "1\n"


def test_without_leases_the_text_alone_decides(
    tree: FileTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_lease(fd: int, kind: int) -> None:
        return None

    monkeypatch.setattr(files, "lease", no_lease)

    assert tree.has_writer("gport") is None
    assert tree.show_if("gport", "16000\n", "1\n")
    assert not tree.show_if("gport", "16000\n", "2\n")
    assert tree.read("gport") == "1\n"


def test_a_user_who_opens_the_file_during_a_write_back_waits_and_wins(
    tree: FileTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = threading.Thread(target=shell, args=(tree, "echo 9 > gport"))
    overwrite = files.overwrite

    def overtaken(fd: int, text: str) -> None:
        user.start()
        path = f"/proc/self/fd/{fd}"
        wait_for(lambda: "BREAKING" in Path("/proc/locks").read_text())
        assert Path(os.readlink(path)).name == "gport"
        overwrite(fd, text)

    monkeypatch.setattr(files, "overwrite", overtaken)
    assert tree.show_if("gport", "16000\n", "15000\n")
    user.join(BOUND)

    assert tree.read("gport") == "9\n"


def test_a_published_file_is_never_seen_half_and_leaves_nothing_beside_it(tree: FileTree) -> None:
    tree.publish("status/state", "stopped\n")
    with (tree.root / "status" / "state").open() as reader:
        tree.publish("status/state", "running\n")

        assert reader.read() == "stopped\n"
    assert tree.read("status/state") == "running\n"
    assert os.listdir(tree.root / "status") == ["state"]


def test_a_failed_publish_leaves_nothing_behind(tree: FileTree) -> None:
    shell(tree, "mkdir -p status/state/full")

    with pytest.raises(IsADirectoryError):
        tree.publish("status/state", "running\n")

    assert os.listdir(tree.root / "status") == ["state"]


def test_removing_the_status_removes_it_all_and_twice_is_no_error(tree: FileTree) -> None:
    for name in STATUS:
        tree.publish(name, "x\n")

    tree.remove_status()
    tree.remove_status()

    assert os.listdir(tree.root / "status") == []


def test_no_descriptor_is_left_by_reading_and_writing(tree: FileTree, keeper: Keeper) -> None:
    before = len(os.listdir("/proc/self/fd"))

    shell(tree, "echo abc > gport; rm start; mkfifo start; rm -f source; ln -s a source")
    keeper.settle()
    tree.publish("status/state", "x\n")

    assert len(os.listdir("/proc/self/fd")) == before


def test_the_signal_of_a_lease_is_one_that_nobody_notices(tree: FileTree) -> None:
    fd = os.open(tree.root / "gport", os.O_RDONLY)
    try:
        assert files.lease(fd, fcntl.F_RDLCK)
        assert fcntl.fcntl(fd, fcntl.F_GETSIG) == signal.SIGURG
    finally:
        os.close(fd)


def test_a_tree_on_disk_follows_an_outcome(tree: FileTree) -> None:
    texts: Mapping[str, str | None] = {"gport": "abc\n", "services": "tcp/80\nudp/53\n"}
    for name, text in texts.items():
        (tree.root / name).write_text(text or "")

    tree.write_back(TreeState().written(tree.read_all(), now=0))

    assert tree.read("gport") == "16000\n"
    assert tree.read("services") == "tcp/80 udp/53\n"


# Links, and what others have made

SECRET = "root:$6$secret\n"


@pytest.fixture
def victim(tree: FileTree) -> Path:
    """A file of other use, that only its owner may read."""
    path = tree.root.parent / "victim"
    path.write_text(SECRET)
    path.chmod(0o600)
    return path


LINKS = {
    "a hard link": "ln -f ../victim real_ip",
    "a hard link moved there": "ln ../victim ../other; mv ../other real_ip",
    "a symbolic link": "ln -sf ../victim real_ip",
    "a hard link to a link": "ln -s victim ../link; ln -f ../link real_ip",
    "a hard link below": "ln -f ../victim timeouts/udp",
    "a hard link to a status file": "ln -f ../victim status/errors",
    "a hard link to what is renamed there": "ln -f ../victim status/.errors.new",
}


@pytest.mark.parametrize("command", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("when", ["at the start", "later"])
def test_what_a_link_leads_to_is_neither_shown_nor_changed(
    tree: FileTree, victim: Path, command: str, when: str
) -> None:
    if when == "at the start":
        shell(tree, command)
    with TreeWatcher(tree.root) as watcher:
        keeper = Keeper(tree, watcher)
        tree.create()
        tree.write_back(keeper.state.written(tree.read_all(), time.monotonic()))
        if when == "later":
            shell(tree, command)
        keeper.settle()
        tree.publish("status/errors", "".join(keeper.state.errors.values()) or "none\n")

    assert (victim.read_text(), mode(victim)) == (SECRET, 0o600)
    assert keeper.differing() == {}
    for path in tree.root.rglob("*"):
        if path.is_file():
            assert (path.is_symlink(), path.stat().st_nlink) == (False, 1)
            assert "secret" not in path.read_text()
    if command.endswith(("real_ip", "udp")):
        (error,) = keeper.state.errors.values()
        assert re.search(f"'\\(a (hard|symbolic) link, owner {OWNER}\\)' is not ", error)


def test_who_links_to_a_setting_does_not_spoil_it(tree: FileTree, keeper: Keeper) -> None:
    shell(tree, "ln gport ../mine; echo 17000 > gport")
    keeper.settle()
    assert keeper.state.config.gport == 17000
    shell(tree, "echo abc > gport")
    keeper.settle()
    assert keeper.differing() == {}
    shell(tree, "echo 666 > ../mine; ln -f gport ../mine")

    again = TreeState()
    tree.write_back(again.written(tree.read_all(), time.monotonic()))
    assert again.config.gport == 17000
    assert (tree.root / "gport").stat().st_nlink == 1


@needs_root
@pytest.mark.parametrize("spoil", ["chown nobody gport", "chmod 666 gport", "chmod 620 gport"])
def test_a_file_that_others_can_write_is_replaced(
    tree: FileTree, keeper: Keeper, spoil: str
) -> None:
    shell(tree, f"echo 17000 > elsewhere; {spoil.replace('gport', 'elsewhere')}")
    theirs = os.open(tree.root / "elsewhere", os.O_WRONLY)  # still theirs after it was moved
    shell(tree, "mv elsewhere gport")
    keeper.settle()
    assert keeper.state.config.gport == 17000
    os.write(theirs, b"666\n")
    os.close(theirs)
    keeper.settle()

    found = (tree.root / "gport").stat()
    assert (tree.read("gport"), keeper.state.config.gport) == ("17000\n", 17000)
    assert (found.st_uid, stat.S_IMODE(found.st_mode)) == (0, 0o644)


@needs_root
def test_a_device_is_not_opened(tree: FileTree, keeper: Keeper) -> None:
    try:
        os.mknod(tree.root / "device", 0o644 | stat.S_IFCHR, os.makedev(10, 130))
    except PermissionError:
        pytest.skip("no device can be made here")
    shell(tree, "mv device gport")
    assert tree.read("gport") == "(a device, owner root)"
    with pytest.raises(Untrusted, match="gport is a device, owner root, and no setting; rm "):
        tree.put("gport", "17000\n")
    keeper.settle()

    assert tree.read("gport") == "16000\n"


@pytest.mark.parametrize("command", [*LINKS.values()][:4], ids=[*LINKS][:4])
def test_a_value_is_not_put_through_a_link(tree: FileTree, victim: Path, command: str) -> None:
    shell(tree, command)

    with pytest.raises(Untrusted, match=rf"real_ip is a (hard|symbolic) link, owner {OWNER}, and "):
        tree.put("real_ip", "192.168.7.7\n")
    assert victim.read_text() == SECRET


# What readers can do


def holds_open(path: Path, how: int = os.O_RDONLY) -> int:
    return os.open(path, how)


def leases(path: Path) -> None:
    fcntl.fcntl(os.open(path, os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK)


def locks(path: Path) -> None:
    fcntl.flock(os.open(path, os.O_RDONLY), fcntl.LOCK_EX)


def locks_bytes(path: Path) -> None:
    fcntl.lockf(os.open(path, os.O_RDONLY), fcntl.LOCK_SH)


def watches(path: Path) -> None:
    INotify().add_watch(str(path), 0xFFF)


def asks_for_signals(path: Path) -> None:
    fcntl.fcntl(os.open(path.parent, os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_MODIFY)


def lists(path: Path) -> None:
    os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)


READERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "open": (holds_open, r"\d+"),
    "open often": (lambda path: [holds_open(path) for _ in range(500)] and 0, "0"),
    "by name": (lambda path: holds_open(path, os.O_PATH), r"\d+"),
    "flock": (locks, "None"),
    "lockf": (locks_bytes, "None"),
    "lease": (leases, "PermissionError"),  # for the owner alone, or CAP_LEASE (fcntl(2))
    "inotify": (watches, "None"),
    "dnotify": (asks_for_signals, "None"),
    "directory": (lists, "None"),
    "write": (lambda path: holds_open(path, os.O_WRONLY), "PermissionError"),
    "remove": (os.unlink, "PermissionError"),
    "link": (lambda path: os.link(path, path.parent.parent / "mine"), "PermissionError"),
}


@pytest.mark.serial
@needs_root
@pytest.mark.parametrize(("act", "said"), READERS.values(), ids=READERS)
@pytest.mark.parametrize("name", ["gport", "timeouts/udp"])
def test_a_reader_holds_up_neither_user_nor_keeper(
    act: Callable[[Path], object], said: str, name: str
) -> None:
    with open_directory() as directory:
        tree = FileTree(directory / "tree")
        tree.create()
        with (
            TreeWatcher(tree.root) as watcher,
            Nobody(lambda: act(tree.root / name)) as nobody,
        ):
            assert re.fullmatch(said, nobody.said), nobody.said
            keeper = Keeper(tree, watcher)
            began = time.monotonic()
            for text in ("1700", "abc", "", "1800"):
                shell(tree, f"printf '{text}' > {name}")
                keeper.settle()
                tree.publish("status/errors", "x\n")
            assert keeper.differing() == {}
            assert (tree.read(name), keeper.state.errors) == ("1800", {})
            assert time.monotonic() - began < 2
