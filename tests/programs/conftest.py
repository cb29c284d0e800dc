"""The peers are programs: their libraries are in an environment of their own."""

collect_ignore = ["peers"]
