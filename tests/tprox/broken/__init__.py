"""Proxies with one fault each, and one without, to see the tester tell them apart.

python -m tests.tprox.broken.NAME STALL HOST PORT LISTEN-PORT
"""
