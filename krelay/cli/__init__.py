"""The command line.

main       runs what is typed, and how it ends
parser     what can be typed
asking     what the commands share: how one fails, the daemon asked, a setting written
serve      `krelay daemon`, `up`
settings   `krelay start`, `stop`, `set`, `get`
show       `krelay status`, `counters`, `nat`, `trace`, `kill`, `flush`
upkeep     `krelay doctor`, `clean`, `demo`
up         both daemons as processes of one command
starting   commands wait for a krelay that is only just being started
capturing  `krelay trace --pcap`
tables     the answers as aligned columns
"""
