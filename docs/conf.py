"""How Sphinx makes a site of these pages (`make docs`)."""

import re
from pathlib import Path

project = "krelay"
project_copyright = "the authors of krelay"
author = project_copyright
extensions = ["myst_parser"]
root_doc = "index"
myst_heading_anchors = 4
html_theme = "alabaster"
html_theme_options = {"description": "A relay that keeps the client's address"}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}
html_show_sourcelink = False
nitpicky = True

_HERE = Path(__file__).parent
_LINK = re.compile(r"\[([^]]+)\]\(([^)\s#:]+)(?:#[^)]*)?\)")
_ENTRY = re.compile(r"^- \[[^]]+\]\(([^)#]+)\.md\)", re.MULTILINE)
_SECTION = re.compile(r"^## (.+)$", re.MULTILINE)


def _navigation(index: str) -> str:
    """The site's navigation: the index's own lists, a tree for each section."""
    _, *parts = _SECTION.split(index)
    trees = (
        "\n".join(["```{toctree}", ":hidden:", f":caption: {title}", *_ENTRY.findall(text), "```"])
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    )
    return "\n\n".join(trees)


def _read(_app: object, name: str, source: list[str]) -> None:
    if name == root_doc:
        source[0] += "\n\n" + _navigation(source[0])
    folder = (_HERE / name).parent

    def named(link: re.Match[str]) -> str:
        """What lies outside of docs/ isn't on the site: there it is named, not linked."""
        target = (folder / link[2]).resolve()
        inside = target.is_relative_to(_HERE)
        return link[0] if inside else f"{link[1]} (`{target.relative_to(_HERE.parent)}`)"

    source[0] = _LINK.sub(named, source[0])


def setup(app: object) -> None:
    """Called by Sphinx."""
    app.connect("source-read", _read)  # type: ignore[attr-defined]
