"""The slow path: packets come from the queue, verdicts go back.

worker    one packet in, one verdict out (pure)
verdicts  verdicts as the kernel takes them, many in one message (pure)
nfqueue   the netfilter queue itself
"""
