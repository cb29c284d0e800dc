"""The kernels that this machine has for virtual machines, and why it has none.

User-Mode Linux is a package.  So is Debian's kernel, but it is not installed, lest it become this
machine's own: `make vm-setup` unpacks it into a cache outside the repository.  What is
made of it there once, the bare kernel and an initramfs, is made beside and renamed: two that make
it at once disturb nobody, and a half is never seen.  The packed kernel would boot as well, but
unpacks itself under emulation, which takes six seconds.
"""

import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from krelay_vm import cpio, guest, kmod
from krelay_vm.errors import LabError

UML_MODULES = Path("/usr/lib/uml/modules")
TUN = Path("/dev/net/tun")
XSTATE = Path(__file__).with_name("xstate.c")
COMPILER = ("gcc", "-O2", "-shared", "-fPIC")
INSTEAD = "make demo VM=qemu, krelay demo --vm qemu, python -m krelay_vm up --backend qemu"
"""What to type where User-Mode Linux doesn't run."""


class Kernel(NamedTuple):
    """A kernel to boot, where its modules are, and the initramfs, if it needs one."""

    image: str
    modules: Path
    initramfs: str = ""


def cache_folder() -> Path:
    """Where Debian's kernel is kept."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(home) / "krelay-vm"


def why_not(backend: str) -> str | None:
    """The reason why this machine can't run hosts on that backend, in one line; None if it can."""
    if backend == "netns":
        return None
    if os.geteuid() != 0:
        return "needs root"
    if not os.access(TUN, os.R_OK | os.W_OK):
        return f"{TUN} is not there or not ours to open: its network interfaces can't be made"
    if reason := _lacks_uml() if backend == "uml" else _lacks_qemu():
        return f"{reason}; run: make vm-setup"
    return None


def _lacks_uml() -> str | None:
    if not os.access(guest.BUSYBOX, os.X_OK):
        return f"no {guest.BUSYBOX}"
    if shutil.which("linux.uml") is None:
        return "User-Mode Linux (linux.uml) is not installed"
    return None if _newest(UML_MODULES) else f"no kernel modules in {UML_MODULES}"


def _lacks_qemu() -> str | None:
    if not _is_static(Path(guest.BUSYBOX)):
        return f"no statically linked {guest.BUSYBOX}"
    if shutil.which("qemu-system-x86_64") is None:
        return "QEMU (qemu-system-x86_64) is not installed"
    return None if _newest(cache_folder(), "linux-image-*") else f"no kernel in {cache_folder()}"


def kernel(backend: str) -> Kernel:
    """The kernel for that backend.  Raises LabError if there is none."""
    if reason := why_not(backend):
        raise LabError(f"backend {backend}: {reason}")
    return _uml() if backend == "uml" else _debian()


def whole_registers(folder: Path) -> str:
    """Makes what to preload into a User-Mode Linux that doesn't know all registers; its path.

    Raises LabError if it can't be compiled here.
    """
    library = folder / "xstate.so"
    try:
        made = subprocess.run(
            (*COMPILER, "-o", library, XSTATE), capture_output=True, text=True, timeout=60
        )
    except OSError as error:
        raise LabError(
            "User-Mode Linux does not know all registers of this machine's processor, and to fix "
            f"that {COMPILER[0]} is needed ({error.strerror}); QEMU works without: {INSTEAD}"
        ) from None
    if made.returncode != 0:
        raise LabError(f"{XSTATE} does not compile: {(made.stderr.splitlines() or ['?'])[0]}")
    return str(library)


def module_files(kernel: Kernel, wanted: Iterable[str]) -> list[str]:
    """The files of these modules and of what they need, in the order to insert them."""
    files = _module_files(kernel.modules)
    needs: dict[str, list[str]] = {}
    # Only what is needed is read: all would be some thousand files.
    unread = list(wanted)
    while unread:
        module = unread.pop()
        if module in files and module not in needs:
            needs[module] = kmod.depends(files[module].read_bytes())
            unread += [*needs[module], *kmod.SOFT.get(module, ())]
    return [str(files[module]) for module in kmod.order(wanted, needs)]


def _uml() -> Kernel:
    program, modules = shutil.which("linux.uml"), _newest(UML_MODULES)
    assert program
    assert modules
    return Kernel(program, modules)


def _debian() -> Kernel:
    folder = _newest(cache_folder(), "linux-image-*")
    assert folder
    (modules,) = (folder / "lib/modules").iterdir()
    image, initramfs = folder / "vmlinux", folder / "initramfs"
    bare = Kernel(str(image), modules, str(initramfs))
    if not image.exists():
        (packed,) = (folder / "boot").glob("vmlinuz-*")
        _place(image, _unpacked(packed.read_bytes()))
    contents = _initramfs(bare)
    if not initramfs.exists() or initramfs.read_bytes() != contents:
        _place(initramfs, contents)
    return bare


def _initramfs(kernel: Kernel) -> bytes:
    modules = [Path(file) for file in module_files(kernel, kmod.QEMU_BOOT)]
    order = "".join(f"{module.name}\n" for module in modules)
    return cpio.archive(
        [
            *(cpio.Entry(name, cpio.FOLDER) for name in ("bin", "dev", "proc", "sys", "root")),
            cpio.Entry("modules", cpio.FOLDER),
            cpio.Entry("dev/console", cpio.CHARACTER_DEVICE, device=(5, 1)),
            cpio.Entry("bin/busybox", cpio.PROGRAM, Path(guest.BUSYBOX).read_bytes()),
            cpio.Entry("init", cpio.PROGRAM, guest.INITRAMFS_INIT.encode()),
            cpio.Entry("modules.order", cpio.FILE, order.encode()),
            *(cpio.Entry(f"modules/{m.name}", cpio.FILE, m.read_bytes()) for m in modules),
        ]
    )


def _unpacked(image: bytes) -> bytes:
    """The kernel in a bzImage, which holds it packed with xz."""
    start = image.find(b"\xfd7zXZ\0")
    if start < 0:
        return image  # packed in another way: it can do it by itself
    return lzma.LZMADecompressor().decompress(image[start:])


def _place(path: Path, contents: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(contents)
    os.rename(file.name, path)


@cache
def _module_files(folder: Path) -> dict[str, Path]:
    return {kmod.name(str(path)): path for path in folder.rglob("*.ko")}


def _newest(folder: Path, pattern: str = "*") -> Path | None:
    """The folder with the highest version number in its name."""

    def version(path: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", path.name)]

    found = [path for path in folder.glob(pattern) if path.is_dir()] if folder.is_dir() else []
    return max(found, key=version, default=None)


@cache
def _is_static(program: Path) -> bool:
    """Whether a program needs no other file: its ELF header has no interpreter (elf(5))."""
    try:
        head = program.read_bytes()
    except OSError:
        return False
    offset, size, count = (
        int.from_bytes(head[0x20:0x28], "little"),
        int.from_bytes(head[0x36:0x38], "little"),
        int.from_bytes(head[0x38:0x3A], "little"),
    )
    starts = range(offset, offset + size * count, size) if size else range(0)
    interpreter = 3  # PT_INTERP
    return bool(starts) and all(
        int.from_bytes(head[at : at + 4], "little") != interpreter for at in starts
    )
