"""The relay socket: tcp-relays register their sessions.

messages      what is said there (pure; tcp_relay uses it too)
registry      what krelay answers (pure)
inforce       what a session can have begun with (pure)
gatewayports  the listening sockets that T1 leads to (pure)
server        the socket itself
"""
