"""`krelay daemon`: the parts put together.

daemon    the file tree, the sockets, signals, and relaying between them
relaying  the queue and the rules, in force or not
keeper    the file tree, kept whatever becomes of the disk
"""
