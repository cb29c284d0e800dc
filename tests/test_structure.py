"""The structure of the programs: what may import what, how large parts may be, names, lists.

What doesn't hold yet stands in EXCEPTIONS with today's figure: it may shrink, never grow, and what
isn't needed any longer has to be taken out.  That pure modules import no I/O is ruff's part
(TID251); that no module of ours brings it in is shown here.
"""

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
PROGRAMS = ("knet", "procfs_sim", "vm", "krelay", "tcp_relay", "usertcp", "tcpcap", "fourover6")
AS_IMPORTED = {"vm": "krelay_vm"}
"""The name of a folder's package, which a link beside it has, where that is another."""
FOLDERS = {
    *PROGRAMS,
    *AS_IMPORTED.values(),
    "packaging",
    "docs",
    "tests",
    "benchmarks",
    "tools",
    "findings",
}

KRELAY = "steps nat rules datapath registration host trace offload control doctor daemon demo cli"
"""Each may import those before it.  So may `krelay` itself, the command line's `__main__`."""
BELOW = {"procfs_sim": "knet", "krelay_vm": "knet", "usertcp": "knet", "fourover6": "knet"} | {
    "tcpcap": "knet krelay_vm usertcp",
    "tcp_relay.engine": "knet usertcp",
    "tcp_relay.service": "knet tcp_relay.engine",
    "tcp_relay.proxy": "knet tcp_relay.engine tcp_relay.service",
    "tcp_relay.relay": "knet procfs_sim tcp_relay.engine tcp_relay.service"
    " krelay.registration.messages",
    "tcp_relay": "knet procfs_sim tcp_relay.engine tcp_relay.service tcp_relay.proxy"
    " tcp_relay.relay",
}
"""What a room, or a package without rooms, may import, beside itself."""
for place, room in enumerate(KRELAY.split()):
    rooms = [f"krelay.{name}" for name in KRELAY.split()[:place]]
    BELOW[f"krelay.{room}"] = " ".join(
        ["knet procfs_sim", *rooms, *["krelay_vm"] * (room == "demo")]
    )
BELOW["krelay"] = BELOW["krelay.cli"] + " krelay.cli"

MOST_LINES, MOST_METHODS, MOST_ROOMS = 450, 25, 12

EXCEPTIONS: dict[str, int] = {}


class Module(NamedTuple):
    path: str
    lines: int
    syntax: ast.Module


Tree = dict[str, Module]
"""The modules of the programs by their names."""


def tree(root: Path) -> Tree:
    modules = {}
    for path in sorted(path for name in PROGRAMS for path in (root / name).rglob("*.py")):
        inside, text = path.relative_to(root), path.read_text()
        first, *rest = inside.with_suffix("").parts
        name = ".".join([AS_IMPORTED.get(first, first), *rest]).removesuffix(".__init__")
        modules[name] = Module(str(inside), len(text.splitlines()), ast.parse(text, str(path)))
    return modules


def imports(modules: Tree) -> dict[str, set[str]]:
    """By module, those of the programs that it imports, wherever in its text it does so."""
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, module in modules.items():
        for node in ast.walk(module.syntax):
            if isinstance(node, ast.Import):
                found[name].update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name}: a relative import"
                for alias in node.names:
                    whole = f"{node.module}.{alias.name}"
                    found[name].add(whole if whole in modules else str(node.module))
        found[name] &= set(modules)
    return found


def room_of(module: str) -> str:
    """The part of the tree with a line of its own in BELOW."""
    room = ".".join(module.split(".")[:2])
    return room if room in BELOW else module.split(".")[0]


def directions(modules: Tree) -> Iterator[str]:
    """An import that BELOW doesn't allow."""
    for name, targets in imports(modules).items():
        allowed = {room_of(name), *BELOW.get(room_of(name), "").split()}
        for target in targets:
            if not {target, room_of(target)} & allowed:
                yield f"{name} imports {target}"


def pure(modules: Tree) -> Iterator[str]:
    """A module that says it is pure, or of which its package says so."""
    for name, module in modules.items():
        package, _, last = name.rpartition(".")
        listed = ast.get_docstring(modules[package].syntax) or "" if package in modules else ""
        is_said = (
            r"\bPure\.",  # of all
            r"\bPure but for (?!.*\b%s\b)",
            r"\bPure:\n\n( *\S.*\n)*? *%s/? ",  # a list of those that are
            r"(?m)^ *([\w/, ]+, )?%s\b.*(\(pure|  pure$)",
        )
        own = ast.get_docstring(module.syntax) or ""
        if "Pure." in own or any(re.search(each.replace("%s", last), listed) for each in is_said):
            yield name


def shells(root: Path, modules: Tree) -> set[str]:
    """The modules that may do I/O, by ruff's settings."""
    ruff = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["ruff"]
    patterns = []
    for pattern, codes in ruff["lint"]["per-file-ignores"].items():
        if "TID251" in codes:
            head, *names, tail = (
                re.split(r"[{},]", pattern) if "{" in pattern else (pattern, "", "")
            )
            patterns += [f"{head}{name}{tail}" for name in names]
    return {
        name
        for name, module in modules.items()
        if any(fnmatch(module.path, pattern) for pattern in patterns)
    }


def impure(root: Path, modules: Tree) -> Iterator[str]:
    """A pure module that imports one that does I/O, perhaps by way of others."""
    edges, outside = imports(modules), shells(root, modules)
    for name in pure(modules):
        for module in reached(edges, name) & outside:
            yield f"{name} is pure, and has {module}"


def circles(modules: Tree) -> Iterator[str]:
    """A module that is in a circle: what it imports leads back to it."""
    edges = imports(modules)
    for name in modules:
        if name in reached(edges, name):
            yield f"{name} is in a circle of imports"


def reached(edges: dict[str, set[str]], begin: str) -> set[str]:
    """What this module imports, and what that does, and so on."""
    found, ahead = set[str](), list(edges[begin])
    while ahead:
        if (module := ahead.pop()) not in found:
            found.add(module)
            ahead += edges[module]
    return found


def sizes(modules: Tree) -> Iterator[tuple[str, int]]:
    """A file or a class that is too large, with its figure."""
    for module in modules.values():
        if module.lines > MOST_LINES:
            yield f"{module.path}: lines", module.lines
    for name, node in classes(modules):
        methods = sum(
            isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) for item in node.body
        )
        if methods > MOST_METHODS:
            yield f"{name}.{node.name}: methods", methods
    rooms = [name for name in packages(modules) if re.fullmatch(r"krelay\.\w+", name)]
    if len(rooms) > MOST_ROOMS:
        yield "krelay: rooms", len(rooms)


def classes(modules: Tree) -> Iterator[tuple[str, ast.ClassDef]]:
    for name, module in modules.items():
        for node in ast.walk(module.syntax):
            if isinstance(node, ast.ClassDef):
                yield name, node


def packages(modules: Tree) -> list[str]:
    return [name for name, module in modules.items() if module.path.endswith("/__init__.py")]


def names(modules: Tree) -> Iterator[str]:
    """A class name that is there more than once."""
    for name, times in Counter(node.name for _, node in classes(modules)).items():
        if times > 1:
            yield f"class {name} is there {times} times"


def lists(modules: Tree) -> Iterator[str]:
    """A module that its package's `__init__` leaves out, or one named there that doesn't exist."""
    for package in packages(modules):
        text = ast.get_docstring(modules[package].syntax) or ""
        heads = re.findall(r"^ *([\w./]+(?:, [\w./]+)*) {2,}\S", text, re.MULTILINE)
        listed = {name.rstrip("/") for head in heads for name in head.split(", ")}
        there = {name.rpartition(".")[2] for name in modules if name.rpartition(".")[0] == package}
        there -= {"__main__"}  # a command's own door: may be listed, and needn't
        for name in sorted(there - listed):
            yield f"{package} doesn't list {name}"
        for name in sorted(listed - there - {"__main__"}):
            if "." not in name:
                yield f"{package} lists {name}, which isn't there"


def references(root: Path, modules: Tree) -> Iterator[str]:
    """A module that a text of the code names by its file, and that isn't there."""
    paths = [f"/{module.path}" for module in modules.values()]
    for module in modules.values():
        text = (root / module.path).read_text()
        for name in re.findall(r"[\w/]+\.py\b", text):
            is_ours = any(path.endswith("/" + name.lstrip("/")) for path in paths)
            if not is_ours and not (root / name).exists():
                yield f"{module.path} names {name}, which isn't there"


def folders(root: Path) -> Iterator[str]:
    """A folder at the top that house rules don't know, but for what .gitignore names."""
    ignored = (root / ".gitignore").read_text().replace("/\n", "\n").split()
    for path in root.iterdir():
        hidden = any(fnmatch(path.name, pattern) for pattern in [".*", *ignored])
        if path.is_dir() and path.name not in FOLDERS and not hidden:
            yield f"{path.name}/ is no folder of the top level"


def faults(root: Path) -> dict[str, int]:
    """What doesn't hold, each with its figure, or 1."""
    modules = tree(root)
    found = [*folders(root), *impure(root, modules), *references(root, modules)]
    for check in (directions, circles, names, lists):
        found += check(modules)
    return dict(sizes(modules)) | dict.fromkeys(found, 1)


def test_structure_holds() -> None:
    found = faults(REPOSITORY)
    worse = {what: figure for what, figure in found.items() if figure > EXCEPTIONS.get(what, 0)}
    assert not worse, "these don't hold, and EXCEPTIONS has no room for them"
    assert not EXCEPTIONS.keys() - found.keys(), "these hold by now: take them out of EXCEPTIONS"


# -------------------------------------------------------------- the checker, on trees made for it

MADE = {
    "knet/__init__.py": '"""Ground.\n\nloop   waits\nticks  counts\n"""',
    "knet/loop.py": "import os",
    "knet/ticks.py": "from knet.loop import now",
    "krelay/__init__.py": '"""A relay.\n\nnat/  flows\ncli/  commands\n"""',
    "krelay/nat/__init__.py": '"""Flows.\n\nflow   one\ntable  all\n"""',
    "krelay/nat/flow.py": "from knet import loop\nclass Flow: ...",
    "krelay/nat/table.py": "from krelay.nat.flow import Flow",
    "krelay/cli/__init__.py": '"""Commands.\n\nmain  all\n"""',
    "krelay/cli/main.py": "import krelay.nat.table",
}


ALWAYS = {
    ".gitignore": "build/\n",
    "pyproject.toml": "[tool.ruff.lint.per-file-ignores]\n'knet/{loop,log}.py' = ['TID251']",
}
PURE = '"""Flows.  Pure.\n\nflow  one\ntable  all\n"""'
IMPURE_MAIN = "krelay.cli.main is pure, and has knet.loop"


@pytest.mark.parametrize(
    ("path", "text", "fault"),
    [
        ("knet/loop.py", "import krelay.nat.flow", "knet.loop imports krelay.nat.flow"),
        ("knet/loop.py", "from krelay.nat import flow", "knet.loop imports krelay.nat.flow"),
        (
            "krelay/nat/flow.py",
            "def late():\n    from krelay.cli.main import main",
            "krelay.nat.flow imports krelay.cli.main",
        ),
        (
            "krelay/nat/flow.py",
            "def late():\n    from krelay.nat import table",
            "krelay.nat.table is in a circle of imports",
        ),
        ("krelay/nat/flow.py", "\n" * (MOST_LINES + 1), "krelay/nat/flow.py: lines"),
        (
            "krelay/nat/flow.py",
            "class Flow:\n" + "    def f(self): ...\n" * (MOST_METHODS + 1),
            "krelay.nat.flow.Flow: methods",
        ),
        ("knet/loop.py", "class Flow: ...", "class Flow is there 2 times"),
        ("krelay/nat/__init__.py", PURE, "krelay.nat.flow is pure, and has knet.loop"),
        ("krelay/cli/main.py", '"""Pure."""\nimport knet.ticks', IMPURE_MAIN),
        ("krelay/cli/__init__.py", '"""main  all (pure)"""', IMPURE_MAIN),
        ("krelay/cli/__init__.py", '"""Pure:\n\nmain  all\n"""', IMPURE_MAIN),
        ("knet/clock.py", "", "knet doesn't list clock"),
        ("krelay/extra/__init__.py", "", "krelay doesn't list extra"),
        ("knet/__init__.py", '"""loop  waits\nlog  tells"""', "knet lists log, which isn't there"),
        ("knet/loop.py", "# see log.py", "knet/loop.py names log.py, which isn't there"),
        ("other/thing.py", "", "other/ is no folder of the top level"),
    ],
)
def test_fault_is_found(tmp_path: Path, path: str, text: str, fault: str) -> None:
    make(tmp_path, MADE)
    assert not faults(tmp_path)
    make(tmp_path, {path: text})
    assert fault in faults(tmp_path)


def test_thirteen_rooms_are_too_many(tmp_path: Path) -> None:
    rooms = {f"krelay/r{number}/__init__.py": "" for number in range(MOST_ROOMS + 1)}
    make(tmp_path, {"krelay/__init__.py": "", **rooms})
    assert faults(tmp_path)["krelay: rooms"] == MOST_ROOMS + 1


def make(root: Path, files: dict[str, str]) -> None:
    for path, text in (ALWAYS | files).items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
