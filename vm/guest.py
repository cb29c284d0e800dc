r"""What a virtual machine is told: its command line, its first program, and every later command.

A host of a topology sits on one of three backends: `netns`, a namespace of this kernel, `uml`, a
User-Mode Linux, or `qemu`, an emulated PC with Debian's kernel.  Here are the two that have kernels
of their own, as text; `krelay_vm.machine` starts them and `krelay_vm.kernels` finds them.

A machine has no disk.  Its root is this machine's own `/`, read-only, so every program and virtual
environment is there; /run, /var/tmp and /dev/shm are its own.  The lab's directory is there at its
own path and can be written to: files go in and out as files.  The machine's part of that is

    vm/HOST/init          its first program, which below is written from the topology
    vm/HOST/console.in    a pipe: the serial line into it, one request a line
    vm/HOST/console.log   the serial line out of it, for people and for error messages
    vm/HOST/shell.tty     where a person can log in: names a terminal, of a User-Mode Linux
    vm/HOST/shell.sock    or is one end of it, of an emulated PC
    vm/HOST/jobs/J/       a command: `run` says what to do, then `pid` and `status` come about,
                          each a number and a newline, without which it is not yet written

The line carries names of jobs and nothing else, whatever a command reads and writes: no quoting, no
escape, no limit of a terminal's, and commands run side by side.

    >>> print(job(["printf", r"%s\n", "it's"], Streams("/dev/null", "out", "err"), "/", {}))
    exec </dev/null >>out 2>>err
    cd / 2>/dev/null || cd /
    exec /usr/bin/env -i --default-signal=INT,QUIT printf '%s\n' 'it'"'"'s'
    <BLANKLINE>
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from krelay_vm.topology import Interface, Topology

BACKENDS = ("netns", "uml", "qemu")
"""Where a host can sit; the first is the default."""

BUSYBOX = "/bin/busybox"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
MEMORY = {"uml": 128, "qemu": 320}
"""Megabytes.  They are taken as they are used."""


class Streams(NamedTuple):
    """Where a command reads and writes: paths in the machine."""

    stdin: str
    stdout: str
    stderr: str


def mac(topology: Topology, interface: Interface) -> str:
    """The hardware address of a machine's interface: locally administered, one of a kind."""
    host, number = topology.names.index(interface.host), interface.name.removeprefix("eth")
    return f"02:76:6d:00:{host:02x}:{int(number):02x}"


def tap(interface: Interface) -> str:
    """The tap device that is the other end of a machine's interface."""
    return interface.name.replace("eth", "tap")


def uml_command(
    kernel: str, topology: Topology, host: str, folder: str, shell: int
) -> tuple[str, ...]:
    """The command line of a User-Mode Linux; `folder` is the machine's own, vm/HOST.

    `shell` is an open descriptor, of a pseudo-terminal where a person can have a shell.

    Without `gro` the driver drops the large frames that its peers may send; `lpj` spares it the
    calibration of a delay loop.
    """
    return (
        kernel,
        f"mem={MEMORY['uml']}M",
        "rootfstype=hostfs",
        "rootflags=/",
        "ro",
        f"init={folder}/init",
        "quiet",
        "loglevel=1",
        "con=null",
        "con0=fd:0,fd:1",
        f"con1=fd:{shell}",
        "umid=uml",
        f"uml_dir={folder}/",
        "lpj=14000000",
        *(
            f"vec{number}:transport=tap,ifname={tap(end)},depth=64,gro=1,mac={mac(topology, end)}"
            + (f",mtu={end.mtu}" if end.mtu else "")
            for number, end in enumerate(topology.interfaces(host))
        ),
    )


def killed_by(console: str) -> int | None:
    """The signal that has killed a machine's first program, as its kernel's panic says it.

    None if nothing did: a first program that ends by itself leads to the same panic, but with its
    exit status, 0 if all was well, in place of the signal (wait(2); the kernel's do_exit).

    >>> panic = "Kernel panic - not syncing: Attempted to kill init! exitcode=0x{:08x}"
    >>> [killed_by(panic.format(status)) for status in (0, 0x100, 0x0B, 0x8B)]
    [None, None, 11, 11]
    """
    panic = _INIT_ENDED.search(console)
    return int(panic[1], 16) & 0x7F or None if panic else None


_INIT_ENDED = re.compile(r"Attempted to kill init! exitcode=0x([0-9a-f]{8})\b")


def qemu_command(
    kernel: str, initramfs: str, topology: Topology, host: str, share: str, folder: str
) -> tuple[str, ...]:
    """The command line of an emulated PC; `share` is the lab's directory, `folder` is vm/HOST.

    It is emulated even where /dev/kvm is: what stands behind that may hang for minutes.
    """
    nics = [
        word
        for number, end in enumerate(topology.interfaces(host))
        for word in (
            "-netdev",
            f"tap,id=n{number},ifname={tap(end)},script=no,downscript=no",
            "-device",
            f"virtio-net-pci,romfile=,netdev=n{number},mac={mac(topology, end)}"
            + (f",host_mtu={end.mtu}" if end.mtu else ""),
        )
    ]
    words = "console=ttyS0 panic=-1 quiet loglevel=1 net.ifnames=0"
    virtfs = "local,security_model=none,multidevs=remap"
    return (
        *("qemu-system-x86_64", "-M", "q35", "-accel", "tcg,tb-size=64"),
        *("-m", str(MEMORY["qemu"]), "-nodefaults", "-no-user-config", "-display", "none"),
        *("-no-reboot", "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        *("-chardev", f"socket,id=shell,path={folder}/shell.sock,server=on,wait=off"),
        *("-serial", "chardev:shell"),
        *("-kernel", kernel, "-initrd", initramfs),
        *("-append", f"{words} SHARE={share} FIRST={folder}/init"),
        *("-virtfs", f"{virtfs},path=/,mount_tag=root,readonly=on"),
        *("-virtfs", f"{virtfs},path={share},mount_tag=share"),
        *nics,
    )


INITRAMFS_INIT = f"""\
#!{BUSYBOX} sh
set -e
b={BUSYBOX}
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t devtmpfs dev /dev
for m in $($b cat /modules.order); do $b insmod /modules/$m; done
plan9=trans=virtio,version=9p2000.L,msize=262144
$b mount -t 9p -o $plan9,cache=loose,ro root /root
$b mount -t 9p -o $plan9,cache=none share /root$SHARE
for d in proc sys dev; do $b mount --move /$d /root/$d; done
exec $b switch_root /root {BUSYBOX} sh $FIRST
"""
"""The first program of an emulated PC: makes the two file systems its own, and goes on there."""

_UML_MOUNTS = """\
# First of all: until now this is the host's /proc, whose self/exe is the kernel, not busybox.
{busybox} mount -t proc proc /proc
b={busybox}
$b mount -t sysfs sys /sys
$b mount -t hostfs -o {share} share {share}
# What is written to a file shall be in it: the lab reads it from outside.
echo 1 >/proc/sys/vm/dirty_expire_centisecs
echo 1 >/proc/sys/vm/dirty_writeback_centisecs
"""

_AGENT = """\
shell="$b sh"
[ ! -x /bin/bash ] || shell="/bin/bash --norc"
(while :; do $b setsid -c $shell; done <>$tty >&0 2>&1) &
$b stty raw -echo
job() {
    $b setsid $b sh $jobs/$1/run &
    echo $! >$jobs/$1/pid
    wait $!
    echo $? >$jobs/$1/status
}
signal() {
    # Before it leads a group of its own, there is only itself.
    [ -e $jobs/$1/status ] || kill -$2 -$3 2>/dev/null || kill -$2 $3
}
set +e
echo 1 >$up
# By a shell without children: when one ends, `read` begins anew and forgets what it has read.
while request=$(read -r line && echo "$line"); do
    case $request in
    run*) job ${request#* } & ;;
    signal*) signal ${request#* } ;;
    esac
done
$b poweroff -f
"""


def init(
    topology: Topology,
    host: str,
    backend: str,
    share: str,
    folder: str,
    modules: Iterable[str] = (),
) -> str:
    """The first program of a machine: its devices, addresses, routes and settings, and the agent.

    `modules` are files to insert into its kernel, in this order.  If a step fails the program ends,
    and so does the machine, with the complaint as its last words.
    """
    interfaces = topology.interfaces(host)
    uml = backend == "uml"
    lines = [
        f"#!{BUSYBOX} sh",
        "set -e",
        _UML_MOUNTS.format(busybox=BUSYBOX, share=shlex.quote(share)) if uml else f"b={BUSYBOX}",
        "for d in /run /var/tmp /dev/shm; do [ ! -d $d ] || $b mount -t tmpfs tmpfs $d; done",
        "$b mkdir -p /dev/pts && $b mount -t devpts devpts /dev/pts",
        "export HOME=/run TMPDIR=/run",
        f"$b hostname {host}",
        *(f"$b insmod {shlex.quote(module)}" for module in modules),
        "$b ip link set lo up",
    ]
    if uml:
        lines += [
            f"$b ip link set {e.name.replace('eth', 'vec')} name {e.name}" for e in interfaces
        ]
    lines += [_set(key, value) for key, value in _settings(topology, host).items()]
    for end in interfaces:
        if end.mtu:
            lines.append(f"$b ip link set {end.name} mtu {end.mtu}")
        lines += [f"$b ip addr add {address} dev {end.name}" for address in end.addresses]
        lines.append(f"$b ip link set {end.name} up")
        # What is sent before the kernel has noticed the carrier is lost.
        lines.append(
            f"n=0; while [ $n -lt 100 ] && read -r state </sys/class/net/{end.name}/operstate"
            " && [ $state = down ]; do $b usleep 10000; n=$((n + 1)); done"
        )
    for route in topology.routes(host):
        family = "-6 " if ":" in route.via else ""
        lines.append(f"$b ip {family}route add {route.destination} via {route.via}")
    lines.append(f"tty={shell_device(backend)}")
    lines.append(f"export PS1={shlex.quote(host + ':')}'\\w# ' PATH={PATH}")
    lines += [f"jobs={shlex.quote(folder)}/jobs up={shlex.quote(folder)}/up", _AGENT]
    return "\n".join(lines)


def shell_device(backend: str) -> str:
    """The terminal in a machine where a person has a shell."""
    return "/dev/tty1" if backend == "uml" else "/dev/ttyS1"


def _settings(topology: Topology, host: str) -> dict[str, str]:
    """The host's kernel settings.

    Those for interfaces to come are for those that are there as well: a machine has its own from
    the beginning.  And an IPv6 address is usable at once, as it is in a namespace.
    """
    names = [end.name for end in topology.interfaces(host)]
    settings: dict[str, str] = {}
    for key, value in topology.sysctls(host).items():
        settings[key] = value
        if ".conf.default." in key:
            settings |= {key.replace(".default.", f".{name}."): value for name in names}
    return settings | {f"net.ipv6.conf.{name}.accept_dad": "0" for name in names}


def _set(key: str, value: str) -> str:
    path = f"/proc/sys/{key.replace('.', '/')}"
    # A kernel without IPv6 has none to keep quiet.
    unless = "[ ! -d /proc/sys/net/ipv6 ] || " if key.startswith("net.ipv6.") else ""
    return f"{unless}echo {shlex.quote(value)} >{path}"


def job(argv: Sequence[str], streams: Streams, cwd: str, env: Mapping[str, str]) -> str:
    """What a machine does for a command: shell text, which becomes that command."""
    stdin, stdout, stderr = map(shlex.quote, streams)
    # The shell ignores SIGINT for what it starts in the background; env undoes it.  It also finds
    # the program itself, where busybox would prefer its own of that name.
    command = ["/usr/bin/env", "-i", "--default-signal=INT,QUIT"]
    command += [*(f"{name}={value}" for name, value in env.items()), *argv]
    return (
        f"exec <{stdin} >>{stdout} 2>>{stderr}\n"
        f"cd {shlex.quote(cwd)} 2>/dev/null || cd /\n"
        f"exec {shlex.join(command)}\n"
    )
