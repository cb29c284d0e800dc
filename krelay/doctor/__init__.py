"""`krelay doctor`: what relaying needs of this host, looked at before the first packet.

facts      what was found out about the host, as values                        pure
findings   what a check says                                                   pure
firewall   what rules do with a packet                                         pure
nftrules   nft's rules, as firewall has them                                   pure
iptrules   those of iptables                                                   pure
passages   our packets as the host's rules see them, and what befalls them     pure
checks     facts -> findings: ok, warning or failed, with the mend             pure
gather     finds the facts out
probe      whether the server's answers to a client come back through here
command    the command itself, and what `krelay start` and `krelay up` say first
"""
