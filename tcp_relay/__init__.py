"""tcp_relay: TCP terminated and passed on, under tcp-relay and under the plain proxy tcpproxy.

It accepts from clients, connects to servers and moves the bytes between.  The two programs differ
in one thing: where a client's server comes from.

    limits      bytes and seconds that a connection may take           (pure)
    half        one direction: what is held, what is to be done next   (pure)
    pair        two directions: when both have ended, or are overdue   (pure)
    counts      what was relayed, and the live connections as a table  (pure)
    options     limits and workers on a command line                   (pure)
    -----------------------------------------------------------------------
    sockets     their options, and how they close
    waiting     those who wait equally long
    line        those who found no local port
    engine      what all pairs share; who lives
    pump        the two sockets of one pair, moved by readiness
    listener    accepting, and what happens when descriptors run out
    service     signals, drain, exit status
    workers     several processes, and a parent that starts them again

    tcp-relay                                              tcpproxy
    connection  one on its way to krelay's server          proxy     one on its way to a destination
    relay       all of them, and their talk with krelay    resolver  the destination's addresses
    link        the client side of the relay socket        tcpproxy  the command line, the wiring
    gport       what the file tree says
    gateway     the gateway port, old and new
    daemon      the wiring; __main__ the command line

It needs no privilege.  Whose address the server sees is krelay's business: all that is said here is
"my client is C:x, my own port is y", once, before connecting.
"""
