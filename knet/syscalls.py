"""The system calls of each program, by what they are for: the table that its filter is made from.

A feature that needs another call adds a line here, to its own entry or a new one; a program lists
its features.  Calls that only some machines or libcs have stand beside those they replace, as the
library leaves out what it doesn't know.  Times and sizes of 32-bit machines have calls of their own
(`..._time64`, `mmap2`, `fstat64`).

`tests/net/test_confinement.py` runs the programs under it, and tries what isn't in it.
"""

import mmap
import os
import socket
import termios

from knet.seccomp import Condition, SyscallRule

_WRITING = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
"""None of these: to read what is there."""
_CLONE_THREAD = 0x10000  # linux/sched.h
_SOCK_TYPE = 0xF  # without SOCK_NONBLOCK and SOCK_CLOEXEC (linux/net.h)
_STREAM, _DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM


def _calls(names: str) -> tuple[SyscallRule, ...]:
    return tuple(map(SyscallRule, names.split()))


def _where(names: str, *conditions: Condition) -> tuple[SyscallRule, ...]:
    return tuple(SyscallRule(name, conditions) for name in names.split())


def _socket(family: int, *kinds: int) -> tuple[SyscallRule, ...]:
    return tuple(
        SyscallRule(call, (Condition(0, family), Condition(1, kind, _SOCK_TYPE)))
        for kind in kinds
        for call in ("socket", "socketpair")
    )


def _ioctls(*requests: int) -> tuple[SyscallRule, ...]:
    return tuple(SyscallRule("ioctl", (Condition(1, request),)) for request in requests)


_SIOCATMARK = 0x8905
"""asm-generic/sockios.h"""

FEATURES: dict[str, tuple[SyscallRule, ...]] = {
    # Python and libc themselves, whatever is done with them.
    "memory": (
        *_calls("brk munmap mremap madvise"),
        *_where("mmap mmap2 mprotect", Condition(2, 0, mmap.PROT_EXEC)),
    ),
    "time": _calls(
        "clock_gettime clock_gettime64 clock_getres clock_getres_time64 gettimeofday time "
        "nanosleep clock_nanosleep clock_nanosleep_time64"
    ),
    "locks": _calls("futex futex_time64 futex_waitv futex_wait futex_wake sched_yield membarrier"),
    "signals": _calls(
        "rt_sigaction rt_sigprocmask rt_sigreturn sigreturn sigaltstack restart_syscall "
        "rt_sigpending rt_sigtimedwait tgkill pause"
    ),
    "who am I": _calls(
        "getpid gettid getppid getuid geteuid getgid getegid getuid32 geteuid32 getgid32 getegid32 "
        "uname sysinfo getrusage getpriority sched_getaffinity getcpu getrandom"
    ),
    "limits": (*_calls("getrlimit ugetrlimit"), *_where("prlimit64", Condition(2, 0))),
    "end": _calls("exit exit_group"),
    # Files are read, never written or made; what is written goes to descriptors that are open.
    "reading files": (
        *_where("open", Condition(1, 0, _WRITING)),
        *_where("openat", Condition(2, 0, _WRITING)),
        *_calls(
            "read readv pread64 close close_range lseek _llseek stat lstat fstat stat64 lstat64 "
            "fstat64 newfstatat fstatat64 statx getdents64 readlink readlinkat access faccessat "
            "faccessat2 getcwd fadvise64 dup fcntl fcntl64"
        ),
    ),
    "watching files": _calls("inotify_init1 inotify_add_watch inotify_rm_watch"),
    "log": _calls("write writev send sendto poll ppoll ppoll_time64"),
    "terminal": _ioctls(termios.TCGETS, termios.TIOCGWINSZ),
    "loop": _calls(
        "epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 poll ppoll ppoll_time64 "
        "select _newselect pselect6 pselect6_time64 pipe pipe2 eventfd2"
    ),
    # Connections.
    "TCP": (
        # A datagram socket that is connected tells which way a route goes.
        *_socket(socket.AF_INET, _STREAM, _DGRAM),
        *_socket(socket.AF_INET6, _STREAM, _DGRAM),
        *_calls(
            "bind listen accept accept4 connect shutdown getsockname getpeername getsockopt "
            "setsockopt send sendto sendmsg recv recvfrom recvmsg"
        ),
        *_ioctls(termios.TIOCOUTQ, termios.FIONREAD, termios.FIONBIO, _SIOCATMARK),
        *_ioctls(termios.FIOCLEX, termios.FIONCLEX),
    ),
    "krelay and the service manager": _socket(
        socket.AF_UNIX, _STREAM, _DGRAM, socket.SOCK_SEQPACKET
    ),
    "answers": _calls("recv recvfrom send sendto poll ppoll ppoll_time64 getsockopt getsockname"),
    # getaddrinfo, in a thread: it loads what nsswitch.conf(5) names, and asks name servers.
    "threads": (
        # Not clone3, whose flags a filter can't see; libc then takes this one.
        *_where("clone", Condition(0, _CLONE_THREAD, _CLONE_THREAD)),
        *_calls("set_robust_list rseq set_tid_address get_robust_list"),
    ),
    "names": (
        SyscallRule(
            "socket", (Condition(0, socket.AF_NETLINK), Condition(2, socket.NETLINK_ROUTE))
        ),
        *_where("mmap mmap2 mprotect", Condition(2, mmap.PROT_EXEC, mmap.PROT_EXEC)),
        *_calls("sendmmsg recvmmsg recvmmsg_time64"),
    ),
}
_EVERY = (
    *("memory", "time", "locks", "signals", "who am I", "limits", "end"),
    *("reading files", "log", "terminal", "loop", "TCP", "krelay and the service manager"),
)
PROGRAMS: dict[str, tuple[str, ...]] = {
    "tcp-relay": (*_EVERY, "watching files"),
    "tcpproxy": (*_EVERY, "threads", "names"),
    "witness": (
        *("memory", "time", "locks", "signals", "who am I", "limits", "end"),
        *("reading files", "log", "answers"),
    ),
}

DEADLY = (
    # To run another program, to look into others, to be another user.
    *("execve", "execveat", "fork", "vfork", "memfd_create", "personality"),
    *("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "perf_event_open"),
    *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid", "setgroups", "capset"),
    # To change the kernel, what it shows, or where this process is.
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot"),
    *("bpf", "mount", "umount2", "move_mount", "open_tree", "fsopen", "fsmount", "mount_setattr"),
    *("pivot_root", "chroot", "setns", "unshare", "swapon", "swapoff", "acct", "quotactl"),
    *("sethostname", "setdomainname", "settimeofday", "clock_settime", "clock_adjtime", "syslog"),
    # Ways round everything above.
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "userfaultfd", "open_by_handle_at"),
    *("add_key", "request_key", "keyctl", "modify_ldt", "iopl", "ioperm"),
)
"""What none of them does, under no libc: an attacker has taken the process over."""


def allowed(program: str) -> tuple[SyscallRule, ...]:
    """The calls of this program."""
    return tuple(rule for feature in PROGRAMS[program] for rule in FEATURES[feature])
