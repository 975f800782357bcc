"""The tests, and what all of them share."""

PATIENCE = 900  # seconds until a process that doesn't end fails its test, also on a busy machine
