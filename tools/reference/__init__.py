"""The reference pages: their tables are made from the code's own.

A page is written by hand but for its blocks, `<!-- made: NAME -->` to `<!-- end: NAME -->`, which
`python -m tools.reference` fills.  Sentences that the code has no place for are in
docs/reference/sentences.toml.

    pages      fills the blocks of all pages
    markdown   tables in Markdown
    settings   the file tree, from procfs_sim.tree
    commands   what can be typed, from the parsers of krelay, tcp-relay and tcpproxy
    sockets    commands of the control socket, messages of the relay socket
    counters   the counters, and why packets are passed or dropped
    events     every message that is logged, found in the source
"""
