#!/usr/bin/env bash
#
# rich 15.0.0: [fe80::1] disappears from what is printed, [2001:db8::1] and [::1] stay.
#
# Guess: markup is [bold], [red on blue], [/]; an address in brackets (RFC 3986, section 3.2.2) is none of these words and is
# printed as it is.
# Seen: whatever begins with a letter a-z behind the bracket is a tag, and an unknown tag is dropped without a word.  So it hangs
# on an address's first digit whether it is seen: link-local and unique-local ones (fe80::, fd00::) vanish, with them the only
# difference between two lines of a table; global ones and ::1 stay, and so do the tests that use 2001:db8::.  "[/24]" raises.
# markup=False, or rich.markup.escape(), is for all text that isn't one's own.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" --quiet --disable-pip-version-check install rich==15.0.0
"$work/venv/bin/python" - <<'PYTHON'
import io
import sys

from rich.console import Console
from rich.errors import MarkupError
from rich.markup import escape


def shown(text: str, **options: bool) -> str:
    file = io.StringIO()
    try:
        Console(file=file, width=80).print(text, **options)
    except MarkupError:
        return "MarkupError"
    return file.getvalue().strip()


EXPECTED = {
    "[2001:db8::1]:53": "[2001:db8::1]:53",
    "[::1]:53": "[::1]:53",
    "[fe80::1]:53": ":53",
    "[fd00::1]:53": ":53",
    "[/24]": "MarkupError",
}
wrong = 0
for text, expected in EXPECTED.items():
    print(f"{text!r} is shown as {shown(text)!r}")
    wrong += shown(text) != expected
    wrong += shown(text, markup=False) != text
    wrong += text != "[/24]" and shown(escape(text)) != text
sys.exit(wrong != 0)
PYTHON
