"""tprox: how good a TCP proxy is, in ten phases, whoever made it.

    python -m tests.tprox tcpproxy
    python -m tests.tprox socat TCP-LISTEN:{listen},fork,reuseaddr TCP:{host}:{port}

The tester holds both ends of every connection: its own server behind the proxy and the clients in
front of it.  So a phase (`scripts`) is a script for two sockets, of which either may do what is bad
manners or bad luck, and what the proxy makes of it is seen at the other.  Where sockets come from
is a parameter (`Ground` in `field`): loopback and a proxy of one's own, or hosts of a lab with a
whole relay between them.

What is judged is what a peer can see: bytes, their order, FIN or RST, and when.  Nothing is asked
about a proxy's insides, and no speed.  Each wait has a limit, so a proxy that hangs fails its phase
and says where.

Threads, not a loop: a script then reads from top to bottom, and a tester that shares its design
with what it tests would share its mistakes.
"""
