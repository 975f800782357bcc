"""Named points where tests make a run fail: FASTPPO_FAULT=name:count:action, as `count` passes the point `name`.

Actions: `kill` (SIGKILL), `stop` (SIGTERM), `enospc` (no space left on the device), `raise`. Unset, a point costs a
look at a module variable.
"""

from __future__ import annotations

import errno
import os
import signal

_wanted = os.environ.get("FASTPPO_FAULT", "").split(":")
_passed = 0


def fault_point(name: str) -> None:
    """Fail here, if that was asked for."""
    if _wanted[0] == name:
        _fail(*_wanted[1:])


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
        raise RuntimeError(f"asked for by FASTPPO_FAULT: {action}")
