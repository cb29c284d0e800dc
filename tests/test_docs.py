"""The pages for users say what is so: commands parse, files and headings exist, addresses agree.

What looks like a command of ours, in a block of shell text or between backquotes, goes through the
command's own parser, with nothing done.  docs/limits.md and README's section Limits name what isn't
there, and are left out.
"""

import argparse
import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from xml.etree import ElementTree

import pytest

import krelay_vm.__main__ as vm_main
import tcp_relay.__main__ as relay_main
from krelay.cli.parser import parser
from krelay_vm import DEFAULT, attended, draw
from procfs_sim.tree import DEFAULT_ROOT, DIRECTORIES, SETTINGS, STATUS, SettingRefused, parse
from tcp_relay import tcpproxy

ROOT = Path(__file__).parents[1]
TOP = ("README.md", "CONTRIBUTING.md", "SECURITY.md")
DOCS = ROOT / "docs"
PAGES = [*(ROOT / name for name in TOP), *sorted(DOCS.rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MACHINES = DOCS / "guides" / "virtual-machines.md"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
IPV4 = re.compile(r"\b(?:\d+\.){3}\d+(?:/\d+)?\b")
TREE_FILE = re.compile(rf"{DEFAULT_ROOT}/([\w/.]*\w)")
WRAPPER = re.compile(r"sudo|nohup|setpriv|--?[\w=,-]+|\w+=.*")
"""A word that may stand before the command that is meant."""
GRAMMAR = re.compile(r"[\[…|]|\.\.\.|\b[A-Z]{2,}\b")
"""A command's form, not a command: `krelay set KEY VALUE`."""

ELSEWHERE = {
    "0.0.0.0/0": "every destination",
    "255.255.255.0": "a netmask",
    "127.0.0.1": "this machine",
    "127.0.0.53": "systemd-resolved",
    "192.0.2.7": "what the DNS server answers (RFC 5737)",
}
"""Addresses of the page that no machine of it has."""


def text(page: Path) -> str:
    """A page, but for what isn't there yet."""
    if page == DOCS / "limits.md":
        return ""
    return re.sub(r"^## Limits\n.*?(?=^## )", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def lines(page: Path) -> Iterator[str]:
    """What can be typed: in blocks, without prompts and output, and between backquotes."""
    for language, block in FENCE.findall(text(page)):
        block = block.replace("\\\n", " ")
        if language == "console":
            yield from (line[2:] for line in block.splitlines() if line[:2] in ("# ", "$ "))
        elif language == "sh":
            yield from block.splitlines()
        elif language == "ini":  # a unit of systemd's
            yield from re.findall(r"^ExecStart=(.+)$", block, re.MULTILINE)
    for span in SPAN.findall(FENCE.sub("", text(page))):
        if not GRAMMAR.search(span):
            yield " ".join(span.split())


def commands(page: Path) -> Iterator[list[str]]:
    """The simple commands of those lines, each as its words."""
    for line in lines(page):
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        try:
            tokens = list(lexer)
        except ValueError:  # a span with a quote in it: no command
            continue
        words: list[str] = []
        for token in [*tokens, ";"]:
            if not token.strip("();<>|&"):
                if words:
                    yield words
                words = []
            elif words or not WRAPPER.fullmatch(token):
                words.append(token)


def parses(words: list[str], patch: pytest.MonkeyPatch) -> bool:
    """Whether that is a command of ours, which its parser takes.  Raises SystemExit otherwise."""
    program, *rest = words
    match Path(program).name, rest:
        case "krelay", [_, *_]:
            _krelay(parser().parse_args(rest))
        case "tcp-relay", _:
            patch.setattr(relay_main, "run_program", lambda *_, **__: 0)
            relay_main.main(rest)
        case "tcpproxy", [_, *_]:
            patch.setattr(tcpproxy, "run_program", lambda *_, **__: 0)
            tcpproxy.main(rest)
        case "python", ["-m", "krelay_vm", _, *_] as arguments:
            _vm(arguments[2:], patch)
        case "python", ["-m", module, *_]:
            assert importlib.util.find_spec(module), module
        case "make", [target] if not target.startswith("-"):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
        case _:
            return False
    return True


def _krelay(args: argparse.Namespace) -> None:
    """The values, too, are taken by the file tree."""
    for name, value in vars(args).items():
        if name in SETTINGS and value is not None:
            parse(name, " ".join(value) if isinstance(value, list) else value)
    if args.command == "set":
        parse(args.key, " ".join(args.value))


def _vm(arguments: list[str], patch: pytest.MonkeyPatch) -> None:
    """The hosts and links are those of the default topology."""

    def host(_: object, name: str, *__: object) -> int:
        assert name in DEFAULT.names
        return 0

    def capture(_: object, link: str, __: object) -> int:
        assert link in ("client-relay", "relay-server")
        return 0

    patch.setattr(os, "geteuid", lambda: 0)
    for name in ("_up", "_list", "_down", "_chosen"):
        patch.setattr(vm_main, name, lambda *_, **__: None)
    patch.setattr(vm_main, "_exec", host)
    patch.setattr(vm_main, "_host", lambda _, name: host(_, name) or name)
    patch.setattr(attended, "console", host)
    patch.setattr(attended, "capture", capture)
    assert vm_main.main(arguments) == 0


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in commands(page):
        try:
            with monkeypatch.context() as patch:
                parses(words, patch)
        except (SystemExit, AssertionError) as error:
            pytest.fail(f"{page.relative_to(ROOT)}: {shlex.join(words)}: {error!r}")
        except SettingRefused as reason:
            if words != ["krelay", "set", "services", "tcp/22"]:  # an example of a refusal
                pytest.fail(f"{page.relative_to(ROOT)}: {shlex.join(words)}: {reason}")


def test_the_commands_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [words for page in PAGES for words in commands(page)]
    ours = []
    for words in found:
        with monkeypatch.context() as patch:
            try:
                if parses(words, patch):
                    ours.append(words)
            except (SystemExit, SettingRefused, AssertionError):
                pass

    for words in (
        ["krelay", "up", "--real-ip", "192.168.0.1", "--services", "tcp/80", "udp/53"],
        ["krelay", "daemon"],
        ["tcp-relay"],
        ["tcpproxy", "www.example.org", "80", "8080"],
        ["python", "-m", "krelay_vm", "capture", "client-relay", "client.pcapng"],
        [
            "python",
            "-m",
            "krelay_vm",
            "up",
            "--client",
            "uml",
            "--relay",
            "qemu",
            "--server",
            "netns",
        ],
        ["make", "setup"],
        ["/opt/krelay/.venv/bin/krelay", "daemon"],
    ):
        assert words in ours


@pytest.mark.parametrize(
    "words",
    [
        "krelay upp",
        "krelay set gate 17000",
        "krelay up --real_ip 192.168.0.1",
        "krelay up --real-ip 192.168.0.1000",
        "tcp-relay --bogus",
        "tcpproxy host 80",
        "python -m krelay_vm up --backend kvm",
        "python -m krelay_vm up --gateway uml",
        "python -m krelay_vm exec gateway ls",
        "python -m krelay_vm capture client-server x.pcapng",
        "make install",
    ],
)
def test_a_command_that_is_wrong_is_noticed(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((SystemExit, AssertionError, SettingRefused)):
        parses(words.split(), monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_of_the_tree_exist(page: Path) -> None:
    there = {*SETTINGS, *STATUS, *DIRECTORIES, "control.sock", "view.sock", "relay.sock"}

    assert set(TREE_FILE.findall(page.read_text())) <= there


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        if anchor:
            assert anchor in map(slug, HEADING.findall(FENCE.sub("", target.read_text()))), link


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_modules_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"(?<![\w/])([\w/]+\.py)\b", page.read_text()):
        folders = (ROOT, ROOT / "tests")
        there = any((folder / name).exists() for folder in folders)
        assert there or ("/" not in name and any((ROOT / "tests").rglob(name))), name


def test_index_names_each_page() -> None:
    index = DOCS / "index.md"
    named = re.findall(r"^- \[[^]]+\]\(([^)#]+)\): ", index.read_text(), re.MULTILINE)

    assert sorted(named) == sorted(
        str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page != index
    )


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def slug(heading: str) -> str:
    """The anchor of a heading, as forges make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# virtual-machines.md


def test_the_page_has_the_topology() -> None:
    rows = {
        (host, adapter, address): gateway if re.fullmatch(IPV4, gateway) else None
        for host, adapter, _, address, gateway in table("| machine | adapter |")
    }

    assert rows == {
        (end.host, end.name, str(end.addresses[0])): DEFAULT.host(end.host).gateway
        for wire in DEFAULT.wires
        for end in wire.ends
    }
    assert f" {draw(DEFAULT).splitlines()[0]}\n" in MACHINES.read_text()


def test_no_other_address_is_in_the_page() -> None:
    ours = {str(a) for wire in DEFAULT.wires for end in wire.ends for a in end.addresses}
    ours |= {str(ip_network(a, strict=False)) for a in ours} | {a.split("/")[0] for a in ours}
    ours |= {str(ip_network(a).network_address) for a in ours if a.endswith(".0/24")}
    found = set(IPV4.findall(MACHINES.read_text()))

    assert all(ip_address(address.split("/")[0]) for address in found)
    assert found - ours == set(ELSEWHERE)


def test_the_network_of_libvirt_is_isolated() -> None:
    for language, block in FENCE.findall(MACHINES.read_text()):
        if language == "xml":
            network = ElementTree.fromstring(block)
            assert network.tag == "network"
            assert [child.tag for child in network] == ["name"]  # no <forward>, no <ip>
            return
    pytest.fail("no XML in the page")


def table(head: str) -> list[tuple[str, ...]]:
    """The rows of a table of the page, which begins like this."""
    _, _, rest = MACHINES.read_text().partition(f"\n{head}")
    rows = rest.split("\n\n")[0].splitlines()[2:]
    return [tuple(cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]) for row in rows]
