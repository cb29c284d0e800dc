"""Flows that the kernel carries under the same table.

fastpath    which flows, what the kernel is still to be told, what it has counted (pure)
kernelpath  the service: when that is done
kernelmaps  the maps: written and read over netlink
copies      copies of packets' heads, from the kernel's packet log
"""
