"""Whom a process becomes and what it can do afterwards, seen from outside and tried from inside."""

import grp
import json
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from knet import privileges
from knet.privileges import DYNAMIC, Account, Cap, NoAccount

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root has something to give up")

HERE = Path(__file__).parents[2]
SOMEBODY = Account("61200", 61200, 61200, (61200,))
PROLOGUE = """
import ctypes, json, os, signal, socket, subprocess, sys, time
# All of it now: later it may be out of reach.
from knet import privileges, process
from knet.privileges import Account, Cap

def status():
    lines = (line.split(":", 1) for line in open(f"/proc/{os.getpid()}/status"))
    found = {name: text.split() for name, text in lines}
    keys = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs")
    return {key: found[key] for key in keys}

def fails(attempt):
    try:
        attempt()
    except OSError as error:
        return error.errno
    return None
"""


def run(code: str, *arguments: str) -> Any:
    """What a process of root's prints as JSON at the end."""
    done = subprocess.run(
        (sys.executable, "-c", PROLOGUE + code, *arguments),
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


BECOMES = """
os.setgroups((0, 4, 27))
privileges.become(Account("somebody", 61200, 61200, (61200,)))
print(json.dumps(status()))
"""


def test_another_user_has_no_capability_and_no_group_of_roots() -> None:
    found = run(BECOMES)
    assert (found["Uid"], found["Gid"], found["Groups"]) == (
        ["61200"] * 4,
        ["61200"] * 4,
        ["61200"],
    )
    for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        assert int(found[kind][0], 16) == 0, kind
    assert found["NoNewPrivs"] == ["1"]


TRIES = """
secret, group_secret = sys.argv[1:]
os.setgroups((0, 4))
privileges.become(Account("somebody", 61200, 61200, (61200,)))
libc = ctypes.CDLL(None, use_errno=True)
def ptrace():
    if libc.ptrace(16, os.getppid(), 0, 0):  # PTRACE_ATTACH
        raise OSError(ctypes.get_errno(), "ptrace")
print(json.dumps({
    "read a secret": fails(lambda: open(secret)),
    "read what a group of root's may": fails(lambda: open(group_secret)),
    "write passwords": fails(lambda: open("/etc/shadow", "a")),
    "be root again": fails(lambda: os.setuid(0)),
    "take a group": fails(lambda: os.setgroups((0,))),
    "raw socket": fails(lambda: socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)),
    "low port": fails(lambda: socket.socket().bind(("127.0.0.1", 1))),
    "another's memory": fails(lambda: open(f"/proc/{os.getppid()}/mem", "rb")),
    "signal": fails(lambda: os.kill(os.getppid(), 0)),
    "ptrace": fails(ptrace),
    "chroot": fails(lambda: os.chroot("/")),
}))
"""


def test_what_another_user_may_try_is_refused(tmp_path: Path) -> None:
    secret, group_secret = tmp_path / "secret", tmp_path / "group"
    for path, mode in ((secret, 0o600), (group_secret, 0o640)):
        path.write_text("for root")
        path.chmod(mode)
        os.chown(path, 0, 4)
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(folder.stat().st_mode | 0o011)
    tried = run(TRIES, str(secret), str(group_secret))
    assert set(tried.values()) <= {1, 13}, tried


SETUID = """
privileges.become(Account("somebody", 61200, 61200, (61200,)))
print(json.dumps(subprocess.run([sys.argv[1]], capture_output=True, text=True).stdout))
"""


def test_a_set_user_id_program_gives_nothing_back(tmp_path: Path) -> None:
    program = Path("/tmp") / f"krelay-suid-{os.getpid()}"
    program.write_bytes(Path("/usr/bin/id").read_bytes())
    try:
        program.chmod(0o4755)
        assert "euid=0" not in run(SETUID, str(program))
    finally:
        program.unlink()


LOOKS = """
privileges.become(Account("somebody", 61200, 61200, (61200,)))
pid = os.getpid()
read, write = os.pipe()
child = os.fork()
if child == 0:
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # the child may be looked into: PR_SET_DUMPABLE
    found = [
        fails(lambda: os.listdir(f"/proc/{pid}/fd")),
        fails(lambda: open(f"/proc/{pid}/environ").read()),
        fails(lambda: open(f"/proc/{pid}/mem", "rb")),
    ]
    os.write(write, json.dumps(found).encode())
    os._exit(0)
os.waitpid(child, 0)
print(os.read(read, 1000).decode())
"""


def test_the_same_user_can_not_look_into_it() -> None:
    assert run(LOOKS) == [13, 13, 13]


PARENT = """
code = '''
import os, signal
from knet import privileges, process
from knet.privileges import Account
process.die_with(os.getppid())
privileges.become(Account("somebody", 61200, 61200, (61200,)))
print(os.getpid(), flush=True)
signal.pause()
'''
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), flush=True)
os._exit(0)
"""


def test_it_still_ends_with_its_parent() -> None:
    pid = run(PARENT)
    for _ in range(1000):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        subprocess.run(("sleep", "0.01"))
    os.kill(pid, signal.SIGKILL)
    pytest.fail("it lives on")


@pytest.mark.parametrize("keep", [(), (Cap.NET_BIND_SERVICE,), (Cap.NET_ADMIN, Cap.NET_RAW)])
def test_root_gives_up_all_but_what_it_keeps(keep: tuple[Cap, ...]) -> None:
    found = run(f"privileges.give_up({[int(cap) for cap in keep]})\nprint(json.dumps(status()))")
    mask = sum(1 << cap for cap in keep)
    assert [int(found[kind][0], 16) for kind in ("CapPrm", "CapEff", "CapBnd")] == [mask] * 3
    assert [int(found[kind][0], 16) for kind in ("CapInh", "CapAmb")] == [0, 0]
    assert found["Uid"] == ["0"] * 4


def test_what_is_not_held_is_not_got() -> None:
    code = "privileges.give_up()\nprivileges.give_up([12])\nprint(json.dumps(status()))"
    assert int(run(code)["CapEff"][0], 16) == 0


def test_accounts_are_read_by_name_and_by_number() -> None:
    root = pwd.getpwuid(0)
    assert privileges.account(root.pw_name) == privileges.account("0")
    assert privileges.account("61200:61201") == Account("61200", 61200, 61201, (61201,))
    assert (str(SOMEBODY), str(privileges.account("0"))) == ("61200:61200", root.pw_name)
    for text in ("no-such-user", "61200:", ":1", "x:y", "", "61200"):
        with pytest.raises(NoAccount, match="there is no user"):
            privileges.account(text)


class Known:
    """What the system's files say, in place of this machine's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.users: dict[str, int] = {}
        self.groups: dict[str, int] = {}
        self.running: list[int] = []
        self.map = "0 0 4294967295\n"
        monkeypatch.setattr(pwd, "getpwnam", lambda name: self._user(name, self.users[name]))
        monkeypatch.setattr(pwd, "getpwuid", lambda uid: self._user(*self._by(self.users, uid)))
        monkeypatch.setattr(grp, "getgrnam", lambda name: self._group(name, self.groups[name]))
        monkeypatch.setattr(grp, "getgrgid", lambda gid: self._group(*self._by(self.groups, gid)))
        monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 99])
        monkeypatch.setattr(privileges, "_running", lambda: self.running)
        monkeypatch.setattr(
            privileges, "_mapped", lambda _, real=privileges._mapped: real(self.map)
        )

    def _by(self, known: dict[str, int], number: int) -> tuple[str, int]:
        for name, value in known.items():
            if value == number:
                return name, value
        raise KeyError(number)

    def _user(self, name: str, uid: int) -> pwd.struct_passwd:
        return pwd.struct_passwd((name, "x", uid, uid, "", "/", "/bin/false"))

    def _group(self, name: str, gid: int) -> grp.struct_group:
        return grp.struct_group((name, "x", gid, []))


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Known:
    return Known(monkeypatch)


def test_tcp_relay_runs_as_krelay_with_its_groups(known: Known) -> None:
    known.users["krelay"] = 777
    assert privileges.unprivileged() == Account("krelay", 777, 777, (777, 99))


def test_without_krelay_it_runs_as_nobody_else_does(known: Known) -> None:
    first = privileges.unprivileged()
    assert first.uid in DYNAMIC
    assert (first.gid, first.groups) == (first.uid, (first.uid,))
    known.running.append(first.uid)
    second = privileges.unprivileged()
    known.users["somebody"] = second.uid
    third = privileges.unprivileged()
    known.groups["some"] = third.uid
    assert len({who.uid for who in (first, second, third, privileges.unprivileged())}) == 4


def test_without_krelay_its_group_serves_if_there_is_one(known: Known) -> None:
    known.groups["krelay"] = 778
    assert privileges.unprivileged().groups == (778,)


def test_where_no_number_is_free_it_says_what_to_do(known: Known) -> None:
    known.running += DYNAMIC
    with pytest.raises(NoAccount, match=r"no user krelay .* useradd --system"):
        privileges.unprivileged()
    known.running.clear()
    known.map = "0 1000 1\n"
    with pytest.raises(NoAccount, match=r"no user krelay .* useradd --system"):
        privileges.unprivileged()


@pytest.mark.parametrize(
    ("ids", "alone"),
    [("0 1000 1\n", True), ("0 0 1\n", True), ("0 0 4294967295\n", False),
     ("0 1000 1\n1 100000 65536\n", False)],
)  # fmt: skip
def test_a_user_namespace_of_one_id_has_nobody_to_become(
    known: Known, ids: str, alone: bool
) -> None:
    known.map = ids
    assert privileges.is_alone() is alone


AS_KRELAY = """
privileges.give_up((12, 13), for_programs=True)
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    if function(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "it failed")
print(json.dumps({
    "become another user": fails(lambda: os.setuid(61200)),
    "take a group": fails(lambda: os.setgroups((27,))),
    "another namespace": fails(lambda: call(libc.unshare, 0x20000)),
    "mount": fails(lambda: call(libc.mount, b"none", b"/mnt", b"tmpfs", 0, 0)),
    "chroot": fails(lambda: os.chroot("/")),
    "trace one with more": fails(lambda: call(libc.ptrace, 16, os.getppid(), 0, 0)),
    "its memory": fails(lambda: open(f"/proc/{os.getppid()}/mem", "rb")),
    "its files": fails(lambda: os.listdir(f"/proc/{os.getppid()}/fd/")
                       and os.readlink(f"/proc/{os.getppid()}/fd/0")),
    "signal another user": fails(lambda: os.kill(int(sys.argv[1]), 0)),
    "others' files": fails(lambda: open(sys.argv[2])),
    "give files away": fails(lambda: os.chown(sys.argv[3], 61200, 61200)),
    "listen below 1024": fails(lambda: socket.socket().bind(("127.0.0.1", 1))),
    "the clock": fails(lambda: time.clock_settime(0, time.time())),
    "the host's name": fails(lambda: socket.sethostname(socket.gethostname())),
    "be nicer to itself": fails(lambda: os.nice(-5)),
    "a device": fails(lambda: os.mknod(sys.argv[3] + "-device", 0o20600, 259)),
}))
"""


def test_what_krelay_can_not_do_any_more(tmp_path: Path) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for path in (theirs, ours):
        path.write_text("a secret")
        path.chmod(0o600)
    os.chown(theirs, 61200, 61200)
    other = subprocess.Popen(("setpriv", "--reuid=61200", "--clear-groups", "sleep", "30"))
    try:
        while Path(f"/proc/{other.pid}/comm").read_text() != "sleep\n":
            pass
        tried = run(AS_KRELAY, str(other.pid), str(theirs), str(ours))
    finally:
        other.kill()
        other.wait()
    assert set(tried.values()) <= {1, 13}, tried


def test_programs_that_it_starts_have_what_it_has() -> None:
    code = """
privileges.give_up((12, 13), for_programs=True)
print(json.dumps(subprocess.check_output(["cat", "/proc/self/status"], text=True)))
"""
    status = dict(line.split(":\t", 1) for line in run(code).splitlines())
    assert [int(status[kind], 16) for kind in ("CapPrm", "CapEff", "CapBnd")] == [0x3000] * 3


def test_those_of_a_user_with_ambient_capabilities_too() -> None:
    code = """
libc = ctypes.CDLL(None)
libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
os.setresgid(61200, 61200, 61200), os.setresuid(61200, 61200, 61200)
libc.capset(privileges._HEADER.pack(privileges._VERSION_3, 0),
            privileges._SETS.pack(0x3400, 0x3400, 0x3400, 0, 0, 0))
for cap in (10, 12, 13):
    libc.prctl(47, 2, cap, 0, 0)
privileges.give_up((12, 13), for_programs=True)
print(json.dumps(subprocess.check_output(["cat", "/proc/self/status"], text=True)))
"""
    status = dict(line.split(":\t", 1) for line in run(code).splitlines())
    assert [int(status[kind], 16) for kind in ("CapPrm", "CapEff", "CapAmb")] == [0x3000] * 3
    assert status["Uid"].split() == ["61200"] * 4
