"""procfs_sim: a tree of small files that behaves like procfs, and is krelay's configuration.

    tree      names, defaults, texts: what is accepted and what it means   (pure)
    state     texts in; values in force, reasons, files to show out        (pure)
    -------------------------------------------------------------------------
    ondisk    the tree as real files: created, read, written               the thin shell
    files     a file that is open
    watcher   inotify on the tree; loaded by itself, since most programs only read and write
    follower  what is written, by inotify or by looking: for both daemons

It imports nothing but knet.  The daemon writes the tree; tcp-relay follows `gport` in
it by itself:


    with TreeWatcher(root) as watcher:  # before the first reading, so that nothing is missed
        outcome = state.written(tree.read_all(), now)
        tree.write_back(outcome)
        ...  # and whenever watcher.fileno() is readable:
        outcome = state.written(watcher.changes(), now)
        tree.write_back(outcome)
"""

from procfs_sim.ondisk import FileTree
from procfs_sim.state import (
    EMPTY_GRACE,
    HostCheck,
    Outcome,
    TreeState,
    applied_text,
    errors_text,
    no_host_check,
)
from procfs_sim.tree import (
    DEFAULT_ROOT,
    DEFAULTS,
    ROOT_VARIABLE,
    SETTINGS,
    STATUS,
    Config,
    Service,
    Setting,
    SettingRefused,
    in_force,
    parse,
    port,
    render,
)

__all__ = [
    "DEFAULTS",
    "DEFAULT_ROOT",
    "EMPTY_GRACE",
    "ROOT_VARIABLE",
    "SETTINGS",
    "STATUS",
    "Config",
    "FileTree",
    "HostCheck",
    "Outcome",
    "Service",
    "Setting",
    "SettingRefused",
    "TreeState",
    "applied_text",
    "errors_text",
    "in_force",
    "no_host_check",
    "parse",
    "port",
    "render",
]
