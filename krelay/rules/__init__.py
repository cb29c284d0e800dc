"""krelay's own rules of the packet filter, as rows.  Pure.

spec       what is to be queued, as a value; names, queues and log groups
steprows   the table of steps: which packets take a step, and what it changes in them
queued     rows by which packets reach the worker
offloaded  rows by which packets that the kernel rewrites go past the worker (nft)
ruleset    all of them together, as text for nft or iptables
"""

DEFAULT_QUEUE = 1600
"""Here, since all commands know it, and few load the rest."""
