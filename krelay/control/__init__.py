"""The control socket.

language  a line in, lines out (pure)
server    the sockets themselves
client    the other side: what commands ask the daemon
"""
