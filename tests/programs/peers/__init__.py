"""Servers and clients of libraries, run by the interpreter that has these."""
