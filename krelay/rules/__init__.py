"""krelay's own rules of the packet filter.  Pure.

ruleset  which packets go to the queue, as a value and as text for nft or iptables
"""
