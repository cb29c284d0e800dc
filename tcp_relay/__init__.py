"""tcp_relay: TCP terminated and passed on, under tcp-relay and under the plain proxy tcpproxy.

It accepts from clients, connects to servers and moves the bytes between.  The two programs differ
in one thing: where a client's server comes from.

    engine/   sessions, and the bytes between their two sockets
    relay/    tcp-relay: its sessions are registered with krelay
    proxy/    tcpproxy: one destination
    service/  processes, signals, limits, options

    __main__, tcpproxy  the two command lines

It needs no privilege.  Whose address the server sees is krelay's business: all that is said here is
"my client is C:x, my own port is y", once, before connecting.
"""
