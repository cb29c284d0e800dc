"""`krelay demo`: a client, a relay and a server on one machine.

play       what is done
servers    nginx and dnsmasq: command lines, configuration
witnesses  what is seen: both wires, the trace, the table, the servers' logs
evidence   what is claimed, as functions from what was seen (pure)
page       the page that is written
"""
