"""The ground that all packages here stand on; it imports nothing of theirs.  Pure:

    endpoint     addresses, ports, five-tuples, flow keys
    networks     subnets, without the circle of `ipaddress`
    localports   local ports that the kernel keeps back
    timerwheel   what is to be looked at, by the second in which to do so
    ratelimit    how often something may happen, and to whom it was refused
    wire/        packets as bytes: IPv4, TCP, UDP, ICMP, their checksums, capture files
    netlink/     netlink messages as bytes: routes, sockets, rules, the packet log, filters
    bpf/         programs in the kernel's packet path, and their maps

What a daemon is made of:

    loop         epoll, timers, signals, and calls for the next turn
    log          one line per event, for people and for machines, without waiting for their reader
    unixsock     Unix sockets that are listened on: who may connect, and how often
    descriptors  descriptors that another process hands over
    sockbuf      a socket's buffer, as large as the kernel grants it
    rawsocket    packets of our own making are sent
    socketdiag   asks the kernel whose TCP sockets are which
    rules/       watching the packet filter's rules

How a process lives, and what it may:

    process      it ends with the process that started it, and says when it serves
    collector    when the cyclic collector runs
    children     programs are started, and what they inherit
    isolated     a module is run by name, from where ours lie
    privileges   users, groups and capabilities, given up for good
    seccomp      system calls that it may make, and no others
    syscalls     the table of those, by program
    roles        who may use which socket
    trust        whether others can change a folder
    listeners    who listens on a port

What is typed and shown:

    usage         `--version`, and which word a wrong one was meant to be
    version       the version of all packages
    relayoptions  options of tcp-relay and tcpproxy, which `krelay up` takes as well
    terminal      streams, lines as wide as the terminal
"""
