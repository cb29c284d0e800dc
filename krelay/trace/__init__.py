"""Packets for people, before and after.  Pure.

lines    one line for each packet, and which of them somebody wants to see
capture  the same as a file for Wireshark
"""
