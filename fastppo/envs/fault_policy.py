"""Handling of environments and workers that fail."""

from __future__ import annotations

import dataclasses

from fastppo.envs.env_state import Way


@dataclasses.dataclass(frozen=True)
class FaultPolicy:
    """Handling of failed environments and workers, and of environment state for a resume.

    Attributes:
        way: how the environments continue after a resume; "replay" records the actions of open episodes.
        restarts: failures to recover from by a restart, which truncates the episode; the next one is an error.
        timeout: seconds that a step or a reset may take in a worker process; None: no limit.
    """

    way: Way = "restart"
    restarts: int = 0
    timeout: float | None = None


NO_FAULT_POLICY = FaultPolicy()
