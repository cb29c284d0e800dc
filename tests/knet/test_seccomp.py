"""The filter of system calls: what is in the table works, what isn't fails, what must not be kills.

Each attempt is made by a process of its own, under the filter of a program.
"""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from knet import seccomp, syscalls
from knet.seccomp import Condition, FilterUnavailable, SyscallRule

HERE = Path(__file__).parents[2]
PROLOGUE = """
import ctypes, encodings.idna, errno, fcntl, gc, json, mmap, os, resource, select, signal, socket
import subprocess, sys, threading, time, traceback
from knet import seccomp, syscalls
libc = ctypes.CDLL(None, use_errno=True)
listening = socket.create_server(("127.0.0.1", 0))
seccomp.load(syscalls.allowed(sys.argv[1]), syscalls.DEADLY)

def call(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), "it failed")
"""
RUN = """
try:
    %s
except Exception as error:
    print(json.dumps(getattr(error, "errno", None) or repr(error)))
else:
    print(json.dumps("worked"))
"""


def attempt(program: str, code: str) -> Any:
    """`worked`, the errno, or (as a negative number) the signal that ended it."""
    command = (sys.executable, "-c", PROLOGUE + RUN % code, program)
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=20)
    if done.returncode:
        return done.returncode
    return json.loads(done.stdout)


NEEDED = {
    "memory": "[bytearray(1 << n) for n in range(8, 26)]; gc.collect()",
    "shared memory": "mmap.mmap(-1, 1 << 20)",
    "the clock": "time.sleep(0.001), time.time(), time.monotonic(), time.process_time()",
    "randomness": "os.urandom(100)",
    "signals": "signal.signal(10, lambda *_: None); signal.raise_signal(10)",
    "a thread's signal": (
        "signal.signal(14, lambda *_: None); signal.pthread_kill(threading.get_ident(), 14)"
    ),
    "reading a file": (
        "open('/etc/passwd').read(); os.stat('/etc'); os.listdir('/etc'); "
        "os.readlink('/proc/self/exe')"
    ),
    "a log line": "os.write(2, b'a line')",
    "a traceback": "traceback.format_exc()",
    "the size of a terminal": "os.isatty(2)",
    "a loop": (
        "e = select.epoll(); r, w = os.pipe(); e.register(r, 1); os.write(w, b'x'); "
        "assert e.poll(1)"
    ),
    "poll, select": "select.poll().poll(0); select.select([], [], [], 0)",
    "accepting": (
        "c = socket.socket(); c.connect(listening.getsockname()); s, _ = listening.accept(); "
        "c.send(b'x'); s.recv(1); s.shutdown(1)"
    ),
    "another port": "socket.create_server(('127.0.0.1', 0), reuse_port=True)",
    "IPv6": "socket.socket(socket.AF_INET6)",
    "options": "listening.setsockopt(6, 1, 1); listening.getsockopt(1, 4)",
    "krelay's socket": "a, b = socket.socketpair(1, 5); a.sendmsg([b'x']); b.recvmsg(10)",
    "a limit": "resource.getrlimit(7)",
    "who it is": "os.getpid(), os.getuid(), os.getppid(), os.uname(), os.getloadavg",
    "duplicates": "os.close(os.dup(2))",
    "the collector": "gc.enable(); gc.collect(); gc.freeze(); gc.disable()",
}


@pytest.mark.parametrize("what", [*NEEDED])
@pytest.mark.parametrize("program", ["tcp-relay", "tcpproxy"])
def test_what_a_relay_does_works(program: str, what: str) -> None:
    assert attempt(program, NEEDED[what]) == "worked"


FAILS = {
    "writing a file": "open('/tmp/krelay-written', 'w')",
    "appending to passwords": "open('/etc/shadow', 'a')",
    "cutting a file": "os.open('/tmp', os.O_RDONLY | os.O_TRUNC)",
    "a file without a name": "os.open('/tmp', os.O_TMPFILE | os.O_RDWR)",
    "a folder": "os.mkdir('/tmp/krelay-made')",
    "removing": "os.unlink('/tmp/krelay-none')",
    "renaming": "os.rename('/tmp/krelay-none', '/tmp/krelay-other')",
    "a link": "os.symlink('/etc/shadow', '/tmp/krelay-link')",
    "modes": "os.chmod('/tmp', 0o1777)",
    "owners": "os.chown('/tmp', 0, 0)",
    "a process": "os.fork()",
    "a signal to another": "os.kill(os.getppid(), 0)",
    "packets of all": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)",
    "raw packets": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "raw packets, whole": "socket.socket(2, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 255)",
    "netfilter": "socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)",
    "a virtual machine's socket": "socket.socket(40, 1)",
    "typing into the terminal": "fcntl.ioctl(2, 0x5412, b'x')",
    "limits": "resource.setrlimit(7, (64, 64))",
    "another priority": "os.nice(1)",
    "a call nobody knows": "call(1 << 20)",
}


@pytest.mark.parametrize("what", [*FAILS])
@pytest.mark.parametrize("program", ["tcp-relay", "tcpproxy"])
def test_what_no_relay_does_fails_and_the_process_goes_on(program: str, what: str) -> None:
    assert attempt(program, FAILS[what]) == errno.ENOSYS


KILLS = {
    "another program": "os.execv('/bin/true', ['true'])",
    "a program by a descriptor": "os.execve(os.open('/bin/true', os.O_RDONLY), ['true'], {})",
    "code in memory": "os.memfd_create('x')",
    "another user": "os.setuid(0)",
    "other groups": "os.setgroups([0])",
    "capabilities": "libc.capset(0, 0)",
    "tracing": "libc.ptrace(16, os.getppid(), 0, 0)",
    "another's memory": "libc.process_vm_readv(os.getppid(), 0, 0, 0, 0, 0)",
    "another namespace": "libc.unshare(0x10000000)",
    "a mount": "libc.mount(b'none', b'/mnt', b'tmpfs', 0, 0)",
    "another root": "os.chroot('/')",
    "a kernel module": "call(175, 0, 0, 0)",
    "bpf": "call(321, 0, 0, 0)",
    "io_uring, round the filter": "call(425, 1, 0)",
    "keys": "call(250, 0, 0, 0)",
}


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="some calls are made by their number")
@pytest.mark.parametrize("what", [*KILLS])
@pytest.mark.parametrize("program", ["tcp-relay", "tcpproxy", "witness"])
def test_what_only_an_intruder_does_kills(program: str, what: str) -> None:
    assert attempt(program, KILLS[what]) == -signal.SIGSYS


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="calls of two kinds are x86's")
def test_calls_of_another_architecture_kill() -> None:
    """getpid by `int 0x80`, where it has the number that exit_group has not."""
    code = (
        "m = mmap.mmap(-1, 4096, prot=3); m.write(bytes.fromhex('b814000000cd80c3')); "
        "a = ctypes.addressof(ctypes.c_char.from_buffer(m)); "
        "assert libc.mprotect(ctypes.c_void_p(a), 4096, 5) == 0; "
        "ctypes.CFUNCTYPE(ctypes.c_int)(a)()"
    )
    assert attempt("tcpproxy", code) == -signal.SIGSYS


def test_tcp_relay_can_make_no_code() -> None:
    assert attempt("tcp-relay", "mmap.mmap(-1, 4096, prot=5)") == errno.ENOSYS
    assert attempt("tcp-relay", "threading.Thread(target=print).start()") != "worked"


def test_tcpproxy_looks_names_up_in_a_thread() -> None:
    code = (
        "found = []; t = threading.Thread(target=lambda: found.append(socket.getaddrinfo("
        "'localhost', 80))); t.start(); t.join(); assert found[0]"
    )
    assert attempt("tcpproxy", code) == "worked"


def test_the_filter_is_every_threads() -> None:
    code = """
import os, sys, threading, json
from knet import seccomp, syscalls
go, done = threading.Event(), []
def other():
    go.wait()
    try:
        os.mkdir("/tmp/krelay-made")
    except OSError as error:
        done.append(error.errno)
thread = threading.Thread(target=other)
thread.start()
seccomp.load(syscalls.allowed("tcpproxy"), syscalls.DEADLY)
go.set()
thread.join()
print(json.dumps(done))
"""
    command = (sys.executable, "-c", code)
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=20)
    assert (done.stdout, done.stderr) == (f"[{errno.ENOSYS}]\n", "")


def test_without_the_library_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seccomp, "LIBRARY", "libseccomp.so.99")
    with pytest.raises(FilterUnavailable, match=r"there is no libseccomp\.so\.99"):
        seccomp.load([], [])


def test_the_table_names_calls_that_exist_and_each_once() -> None:
    library = seccomp._library()
    names = {rule.call for rules in syscalls.FEATURES.values() for rule in rules}
    newer = {"mseal"}
    for name in (names | set(syscalls.DEADLY)) - newer:
        assert library.seccomp_syscall_resolve_name(name.encode()) != seccomp._UNKNOWN, name
    assert not names & set(syscalls.DEADLY)
    assert len(set(syscalls.DEADLY)) == len(syscalls.DEADLY)
    used = {feature for features in syscalls.PROGRAMS.values() for feature in features}
    assert used == set(syscalls.FEATURES)


def test_every_program_makes_its_rules_of_its_features() -> None:
    for program, features in syscalls.PROGRAMS.items():
        wanted = [rule for feature in features for rule in syscalls.FEATURES[feature]]
        assert list(syscalls.allowed(program)) == wanted
    assert SyscallRule("openat", (Condition(2, 0, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC),)) in (
        syscalls.allowed("tcp-relay")
    )
