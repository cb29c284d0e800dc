"""The NAT table: flows, what their packets become, for how long, and on whose account.  Pure.

flow        one flow: its packets' rewrites, its counts, its timeouts
table       which flow a packet begins, and how flows close
store       the flows that live, and the look-up tables of the packet path
mappings    which end is whose, and what a new flow gets
tracking    what packets tell of flows
learning    DNS flows as the table sees them
dnsflows    flows that the kernel has learnt by itself
expiry      when flows are looked at next
events      what the table tells its observers
tcpstate    how far a TCP connection has come, seen from the middle
admission   which new flows are admitted, and which are evicted for them
eviction    which flow goes where a new one needs its place
direct      clients' own conversations with a server
ownflows    this host's own flows from relayed ports
ports       the relay's own UDP ports
icmperror   ICMP errors about relayed packets, translated
"""
