"""Flows that are offloaded: the kernel carries them under the same table.

backend     what carries offloaded flows: a protocol (pure)
layout      what stands in the maps of the kernel's programs, byte by byte (pure)
policy      which flows, and what the backend is still to be told (pure)
accounting  what the backend has counted for them (pure)
learning    which DNS queries the kernel may relay without asking first (pure)
queries     DNS queries that begin flows by themselves: told of, and told
service     when flows are offloaded, polled and withdrawn
carrier     the backend on this host: loaded, attached, and asked by a rule
tc          the backend of programs at tc (programs/relay.c): its maps
events      what the packet filter tells of what servers send past the relaying
copies      copies of packets' heads, from the kernel's packet log
"""
