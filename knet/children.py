"""The programs that krelay starts, and what they inherit: nothing that isn't named here.

A user who becomes root to type a command brings things along that other users may have a hand in:
the current folder, an environment that names further folders, open files, a umask, signals that
are ignored.  None of it may decide whose code is run.  So children of ours

- are found by absolute path, in folders that only root or this user may write to;
- take Python's modules from where ours are, not from the caller's folder (isolated.py), and nothing
  from variables that are Python's, the linker's or a tool's: the environment is made from a list;
- begin with default signals, no signal blocked, umask 022, a session of their own, no file but
  the standard ones, and none of root's supplementary groups; and end when this process does, in
  whatever way (process).

This process itself can't undo how it was started, but what it does from then on it can: `prepare`,
and isolated.leave_callers_folder.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from knet import isolated, privileges, process, trust

FOLDERS = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where programs are looked for if there is no $PATH."""
NOWHERE = "/nonexistent"
"""Where they are if nothing of $PATH can be trusted: an empty one is the caller's folder."""
KEPT = frozenset(
    {
        *("LANG", "LANGUAGE", "TERM", "TZ"),  # how things are shown
        *("KRELAY_ROOT", "NOTIFY_SOCKET", "JOURNAL_STREAM"),  # whom to serve, whom to tell
    }
)
"""Variables that children get, beside LC_*."""
LOADERS = ("PYTHON", "LD_", "BASH_ENV", "ENV", "XTABLES_LIBDIR", "IPTABLES_LIB_DIR")
"""How variables begin that name code to be run by the program that reads them."""
UMASK = 0o022


def python(module: str, *arguments: str) -> tuple[str, ...]:
    """The command line that runs a module of ours by this Python."""
    script = str(Path(isolated.__file__).resolve())
    return (sys.executable, "-I", *compiled_as_here(), script, module, *arguments)


def compiled_as_here() -> tuple[str, ...]:
    """Python's options by which a child keeps compiled modules where this process keeps them.

    `-I` has it read no variables, so it is told.  A folder that others may write to is passed on
    to nobody, and then nothing is kept.
    """
    folder = sys.pycache_prefix
    if sys.dont_write_bytecode or (folder and not is_trusted(folder)):
        return ("-B",)
    return ("-X", f"pycache_prefix={folder}") if folder else ()


def environment(given: Mapping[str, str] | None = None) -> dict[str, str]:
    """What children get of these variables, by default this process's own."""
    given = os.environ if given is None else given
    kept = {name: value for name, value in given.items() if _is_kept(name)}
    return {"PATH": trusted_path(given.get("PATH", FOLDERS)), **kept}


def trusted_path(path: str) -> str:
    """The folders of a $PATH into which only root and this user can put a program.

    Relative ones, also an empty one, are the caller's folder.
    """
    return ":".join(filter(is_trusted, path.split(":"))) or NOWHERE


def is_trusted(folder: str) -> bool:
    """Whether this is an absolute path to a folder whose contents only root and this user decide.

    By the rule for file trees (knet/trust.py): each folder on the way counts.
    """
    path = Path(folder)
    try:
        trust.check(path)
    except (OSError, ValueError):
        return False
    return path.is_absolute() and path.is_dir()


def start(module: str, *arguments: str) -> subprocess.Popen[bytes]:
    """Runs a module of ours; it ends with this process.  Output and errors go where ours go.

    To be called by a thread that stays (process.py).  Raises OSError.
    """
    return subprocess.Popen(
        python(module, *arguments),
        stdin=subprocess.DEVNULL,
        cwd="/",
        env=environment(),
        umask=UMASK,
        start_new_session=True,  # Ctrl-C is ours to pass on, in order
        preexec_fn=partial(_begin, os.getpid()),
    )


def prepare() -> None:
    """For commands: what this process starts by itself, or has a library start, is as safe.

    $PATH is what `trusted_path` leaves of it, and there are no variables that tell Python, the
    linker or a shell to load more.
    """
    os.environ["PATH"] = trusted_path(os.environ.get("PATH", FOLDERS))
    for name in [name for name in os.environ if name.startswith(LOADERS)]:
        del os.environ[name]
    # A process that ignores its children's deaths isn't told how they ended (wait(2)).
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _is_kept(name: str) -> bool:
    return name in KEPT or name.startswith("LC_")


def _begin(parent: int) -> None:
    """In the child, before its program."""
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    if os.geteuid() == 0:
        privileges.set_groups(())  # those of a login: adm, docker, sudo
    process.die_with(parent)
