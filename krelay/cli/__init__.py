"""The command line.

main       what can be typed, and each command
up         `krelay up`
starting   commands wait for a krelay that is only just being started
capturing  `krelay trace --pcap`
terminal   columns, colour, streams that may close early
"""
