"""The version of all packages here: they are released together."""

VERSION = "0.1.0"
