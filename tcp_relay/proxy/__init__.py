"""tcpproxy.

proxy     its connections: one destination, at each of its addresses in turn
resolver  that destination's addresses, looked up again and again
"""
