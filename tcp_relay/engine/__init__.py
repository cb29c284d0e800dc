"""Sessions, and the bytes between their two sockets.

channel    one direction: bytes, then the end of file (pure)
session    both directions of one relayed connection (pure)
limits     what a session may take (pure)
counts     what has been relayed, and live sessions as a table (pure)
legs       both sockets of one session: connected, watched, closed
pump       the bytes between them
engine     what all sessions of a process share
listener   accepting, bounded per turn
sockets    sockets of both legs, and how they close
timeouts   the fixed-timeout queue, for waits that are all equally long
portqueue  connections that found no local port, or no socket, wait in a queue
"""
