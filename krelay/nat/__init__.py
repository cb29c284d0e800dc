"""The NAT table: flows, what their packets become, for how long, and on whose account.  Pure.

flow       one flow: its packets' rewrites, its counts, its timeouts
table      all flows, by what their packets look like in each direction
events     what the table tells its observers
tcpstate   how far a TCP connection has come, seen from the middle
admission  which new flows are admitted, and which are evicted for them
eviction   which flow goes where a new one needs its place
dnsflows   flows that the kernel has learnt by itself
ownflows   this host's own flows from relayed ports
ports      the relay's own UDP ports
icmperror  ICMP errors about relayed packets, translated
"""
