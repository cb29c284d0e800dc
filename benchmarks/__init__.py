"""benchmarks: how fast the relay is, as ratios between things measured in turn in one run.

    figures       series of readings, their medians, ratios and goals, as Markdown and JSON  (pure)
    ------------------------------------------------------------------------------------------
    ground        what every measurement stands on: a krelay in a lab, a sender, counters, progress
    paths         the ways that UDP takes: forwarding, conntrack DNAT, krelay, scapy
    udp           packets/s on them, and what they cost
    dns           queries and answers per second on them, from ports kept and from new ones
    flows         10 and 50,000 flows: set-up, memory, the cost of a packet
    proxies       TCP by way of a relay: bulk, connections, requests, and their cost
    idle          memory of an idle connection, and what thousands of them cost the others
    peers         HAProxy, nginx, socat and ours, as both have them measured
    web           nginx, wrk and curl around them
    processes     processor time and memory of programs, and time of cores
    alone         a core to itself for the relay host, so that its cost can be seen
    micro         Worker.handle by itself: needs no root
    plots         the same as pictures
    sender, asker, scapy_worker, bulk, echo   programs of their own, run in a host of the lab

Machines are shared and noisy, so no absolute figure means much.  What is compared is therefore
measured by turns (A B C, A B C, A B C), and the median of each is taken.
"""
