"""Exit reasons of the training processes that `fastppo bench` and `fastppo study` start."""

from __future__ import annotations

import signal


def exit_reason(status: int, log: str) -> str:
    """Return one line that says why a process failed.

    Args:
        status: exit status as `subprocess` reports it; negative: minus the signal that killed the process.
        log: standard error of the process; its last line is the reason if no signal killed it.
    """
    if status < 0:
        return f"killed by signal {-status}{' (out of memory?)' if status == -signal.SIGKILL else ''}"
    lines = log.strip().splitlines()
    return lines[-1] if lines else f"exit status {status}"
