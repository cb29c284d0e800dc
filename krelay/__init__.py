"""krelay: a relay that stands in front of a real server and keeps the client's address.

    steps          hooks and steps: the words that all rooms share        (pure)
    nat/           the NAT table: which packet becomes which              (pure)
    rules/         krelay's own rules of the packet filter                (pure)
    datapath/      one packet in, one verdict out; the queue
    registration/  the relay socket: tcp-relays register their sessions
    host/          what krelay asks of this host, and what it keeps on it
    trace/         packets for people, before and after                   (pure)
    offload/       flows that the kernel carries
    control/       the control socket
    doctor/        what is wrong, before the first packet
    daemon/        the parts put together
    demo/          `krelay demo`
    cli/           the command line

Imports point upwards in this list, never down; tests/test_structure.py holds it.
"""
