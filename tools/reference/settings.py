"""The file tree: a row for each setting, and for what else is there."""

from procfs_sim.tree import DEFAULTS, SETTINGS, STATUS, in_force
from tools.reference.markdown import agree, code, sentences, table

SOCKETS = ("control.sock", "view.sock", "relay.sock")
OTHERS = (*STATUS, *SOCKETS, ".lock", ".reserve")


def settings() -> str:
    """The settings, in the order in which they are shown."""
    have = sentences()["settings"]
    agree("settings", SETTINGS, have)
    return table(
        ("file", "default", "accepted", "meaning"),
        (
            (code(name), code(in_force(name, DEFAULTS)), setting.accepted, have[name])
            for name, setting in SETTINGS.items()
        ),
    )


def others() -> str:
    """What krelay itself writes, and its sockets."""
    have = sentences()["tree"]
    agree("file tree", OTHERS, have)
    return table(("file", "meaning"), ((code(name), have[name]) for name in OTHERS))
