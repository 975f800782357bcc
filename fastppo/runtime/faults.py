"""Fault injection for tests: FASTPPO_FAULT=name:count:action fails the count-th pass of the point `name`.

Actions: `kill` (SIGKILL), `stop` (SIGTERM), `enospc` (no space left on the device), `raise` (RuntimeError). Without
the variable, a point costs one comparison.
"""

from __future__ import annotations

import errno
import os
import signal

_requested = os.environ.get("FASTPPO_FAULT", "").split(":")
_passed = 0


def fault_point(name: str) -> None:
    """Fail here if FASTPPO_FAULT requests it."""
    if _requested[0] == name:
        _fail(*_requested[1:])


def _fail(count: str, action: str) -> None:
    global _passed
    _passed += 1
    if _passed != int(count):
        return
    if action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGTERM)
    elif action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    else:
        raise RuntimeError(f"fault injected by FASTPPO_FAULT, action {action}")
