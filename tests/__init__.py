"""The tests, and what all of them share."""

import time

PATIENCE = 900  # seconds until a process that doesn't end fails its test, also on a busy machine


def wait_until(happens):
    """Wait until `happens()` is true."""
    deadline = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.02)
