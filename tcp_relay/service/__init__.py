"""How the daemons live and end.

service  one process: signals, limits, privileges
workers  several of them, and a parent that starts them again
options  the options that tcp-relay and tcpproxy share
"""
