"""`krelay demo`: a client, a relay and a server on one machine.

play      what is done
evidence  what is claimed, as functions from what was seen (pure)
page      the page that is written
"""
