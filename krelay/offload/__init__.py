"""Flows that are offloaded: the kernel carries them under the same table.

backend     what carries offloaded flows: a protocol (pure)
policy      which flows, and what the backend is still to be told (pure)
accounting  what the backend has counted for them (pure)
learning    which DNS queries the kernel may relay without asking first (pure)
service     when flows are offloaded, polled and withdrawn
nft         the backend of nftables: its maps, over netlink
events      what the kernel tells of packets that it relays by itself
copies      copies of packets' heads, from the kernel's packet log
"""
