"""The control sockets.  Pure:

commands  a line in, lines out
views     flows and other values as text
metrics   the counters, each with its sentence

The sockets themselves:

server    both are listened on, and packets are shown to traces
clients   one client: its requests, its answers, its trace
turns     which client is next
client    the other side: what commands ask the daemon
"""
