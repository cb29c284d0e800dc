"""krelay: a relay that stands in front of a real server and keeps the client's address.

    wire   formats: IPv4, UDP, TCP, ICMP, checksums             (pure)
    flow   endpoints, services, the direction of a conversation  (pure)
    nat    the NAT table: which packet becomes which             (pure)
    worker one packet in, one verdict out                        (pure)
    control, relaymsg, ruleset  texts and messages               (pure)
    ------------------------------------------------------------
    keeper, treelock, reserve   the file tree, whatever becomes of it
    loop, nfqueue, netfilter, controlsock, relaysock, daemon, cli   the thin shell

Imports point one way, downwards in the first block; only the shell knows sockets, clocks and files.
"""
