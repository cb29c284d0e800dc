"""Writes the pages, or says with `--check` which are not fresh."""

import sys

from tools.reference.markdown import NoSentence
from tools.reference.pages import made

check = sys.argv[1:] == ["--check"]
if sys.argv[1:] and not check:
    sys.exit("usage: python -m tools.reference [--check]")
try:
    stale = [(page, text) for page, text in made() if page.read_text() != text]
except NoSentence as reason:
    sys.exit(f"reference: {reason}")
for page, text in stale:
    if not check:
        page.write_text(text)
    print(f"{'not fresh' if check else 'written'}: {page}")
sys.exit(1 if check and stale else 0)
