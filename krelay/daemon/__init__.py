"""`krelay daemon`: the parts put together.

daemon        the file tree, the sockets, signals, and relaying between them
relaying      relaying started, stopped, and as the config says
apply         what follows from a config: policy and rules (pure)
attempts      when what failed is tried again
rulekeeper    the rules, made and kept
queues        the queues of packets
surroundings  this host: addresses, the link to the server
gatewaywatch  whether clients of TCP can be led to a tcp-relay
flowends      flows ended by krelay itself
ownpackets    packets of krelay's own that this host stops
keeper        the file tree, kept whatever becomes of the disk
troubles      what is wrong with it, and what the log has heard of that
"""
