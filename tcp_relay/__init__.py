"""tcp_relay: the TCP relay daemon.

It accepts from clients, connects to servers and moves the bytes between.

    half        one direction: what is held, what is to be done next   (pure)
    pair        two directions: when both have ended                   (pure)
    -----------------------------------------------------------------------
    pump        the two sockets of one pair, moved by readiness
    connection  one relayed connection, from accept to its end
    relay       all of them, and their talk with krelay
    link        the client side of the relay socket
    listener    accepting, and what happens when descriptors run out
    gport       which gateway port and server the file tree names
    daemon      the wiring; __main__ the command line

It needs no privilege.  Whose address the server sees is krelay's business: all that is said here is
"my client is C:x, my own port is y", once, before connecting.
"""
