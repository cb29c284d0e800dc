"""Packets for people, before and after.  Pure.

lines    one line for each packet, and which of them a trace selects
capture  the same as a file for Wireshark
"""
