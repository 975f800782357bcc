"""What the training loop asks of N environments, wherever they live."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

from fastppo.spaces import ActionSpec, ObsSpec


class Step(NamedTuple):
    """What N environments answer, wherever they live: the loop copies it into its storage, casting as it copies.

    Tensors may be overwritten by the next step.
    """

    obs: Tensor  # [N, *obs] where to act next (first obs of a new episode after an end)
    rewards: Tensor  # [N] raw
    terminated: Tensor  # [N] bool: the task ended, the future is worth nothing
    truncated: Tensor  # [N] bool: cut short, the future is worth V(final_obs)
    valid: Tensor | None  # [N] bool: False where the vector env only reset (next-step autoreset); None: all True
    cut: Sequence[int]  # envs whose episode was cut (truncated, not terminated) and whose row in final_obs is set
    final_obs: Tensor | None  # [N, *obs] last observations, true in the rows of `cut`


class VecEnv(Protocol):
    """N environments as the loop sees them.

    Attributes:
        n_envs: N.
        obs_spec: of one observation.
        action_spec: of one action.
        fillers: whether some steps are only resets (next-step autoreset), so that `Step.valid` is not None.
        notes: what the user should know of this environment, a line each.
    """

    n_envs: int
    obs_spec: ObsSpec
    action_spec: ActionSpec
    fillers: bool
    notes: Sequence[str]

    def reset(self, seed: np.random.SeedSequence) -> Tensor:
        """Start every environment, each with a seed of its own; returns obs [N, *obs]."""

    def step(self, actions: Tensor) -> Step:
        """Act in every environment with the distribution's actions [N, *action]."""

    def close(self) -> None:
        """Let go of processes and windows."""
