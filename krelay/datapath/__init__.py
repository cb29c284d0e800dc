"""The slow path: packets come from the queue, verdicts go back.  Pure but for nfqueue.

worker     one packet in, one verdict out
state      what the stages of the worker share
newflow    what a packet that no flow claims begins
reopening  SYNs that come to a flow: its own, or another connection's
refusals   how senders are told that their packets aren't relayed
probes     packets that make an end of a connection say something
readdress  a packet with other addresses and ports
policy     what new flows get, and what this host is
verdict    what can be decided for a packet
reasons    why a packet isn't rewritten, each with its sentence
counters   what was counted
verdicts   verdicts as the kernel takes them, many in one message
nfqueue    the netfilter queue itself
"""
