"""`krelay doctor`: what relaying needs of this host, looked at before the first packet.

Facts -> findings:

facts         what was found out about the host, as values                      pure
findings      ok, warning or failed, what is wrong, and what fixes it           pure
checks        all checks in their order, and what each needs to have been seen  pure
installation  what krelay itself needs and runs on                              pure
routing       links and routes                                                  pure
ports         who listens, which ports are left                                 pure
conntrack     connection tracking that is full, or forgets early                pure
firewall      what rules do with a packet                                       pure
nftrules      reads nft's rules                                                 pure
iptrules      reads iptables' rules                                             pure
passages      our packets as the host's rules see them                          pure
rulecheck     what the host's rules do with them: the check `firewall`          pure
rulefix       the command that lets them by                                     pure

The host -> facts:

gather        looks at all parts of the host
seen          what has been found out so far
seenkernel    /proc: settings, counters, sockets, the queue
seenlinks     the routing socket, ethtool
seenrules     nft and iptables
probe         whether the server's answers to a client come back through here

command       the command itself, and what `krelay start` and `krelay up` say first
"""
