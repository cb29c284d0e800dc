"""Real programs through the relay, each beside itself without it: `python -m tests.programs`.

table      servers and clients, as data
ways       the ways through the relay, and what a run through one is worth
report     the page of results, and their JSON
packages   what of Debian and of PyPI is there, and how to get it
runner     the lab, the relay, and the runs
peers      small servers and clients for libraries that have no program of their own
"""
