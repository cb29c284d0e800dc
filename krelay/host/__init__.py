"""What krelay asks of this host, and what it keeps on it.

hostview    addresses, and what lies beside the server (pure)
links       those are asked for, and watched
attachment  programs are attached to links, and taken from them
netfilter   rules are put into the kernel and taken out again
tracking    connection tracking's timers
processes   programs of ours that run, and their file trees
witness     who has a socket open, asked of a process that may look
treelock    who serves a file tree
reserve     room on the disk, in hand before it is needed
cleanup     `krelay clean`
"""
