"""Rules of the packet filter, of krelay and of other programs.

rows      rules as values; the texts of nft and iptables come from them (pure)
ports     ranges of ports, and sets, as both tools write them (pure)
iptables  input for iptables-restore (pure)
run       runs nft and iptables; what their complaints mean
kernel    asks and tells nf_tables by netlink, without nft
watch     says when another program takes rules out of tables that are watched
"""
