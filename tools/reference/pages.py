"""The pages with their blocks filled."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tools.reference import commands, counters, events, settings, sockets
from tools.reference.markdown import REFERENCE

BLOCKS: Mapping[str, Mapping[str, Callable[[], str]]] = {
    "settings.md": {"settings": settings.settings, "others": settings.others},
    "commands.md": {
        "krelay": commands.krelay,
        "tcp-relay": commands.tcp_relay,
        "tcpproxy": commands.tcp_proxy,
    },
    "control-socket.md": {"commands": sockets.control},
    "relay-socket.md": {"requests": sockets.requests, "answers": sockets.answers},
    "counters.md": {"counters": counters.counters, "reasons": counters.reasons},
    "log-events.md": {"events": events.tables},
}


def made() -> Iterator[tuple[Path, str]]:
    """Each page, and what it is to be.  Raises NoSentence."""
    for name, blocks in BLOCKS.items():
        page = REFERENCE / name
        text = page.read_text()
        for block, make in blocks.items():
            text = filled(text, block, make())
        yield page, text


def filled(text: str, block: str, content: str) -> str:
    """The page with that in that block.  Raises ValueError if it hasn't exactly one.

    >>> filled("a <!-- made: x -->old<!-- end: x --> b", "x", "new").splitlines()
    ['a <!-- made: x -->', '', 'new', '', '<!-- end: x --> b']
    """
    begin, end = f"<!-- made: {block} -->", f"<!-- end: {block} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"no place for {block}")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(
        pattern, lambda _: f"{begin}\n\n{content}\n\n{end}", text, count=1, flags=re.DOTALL
    )
