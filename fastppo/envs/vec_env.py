"""What the training loop asks of N environments, wherever they live."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from fastppo.envs.env_state import Resumable
from fastppo.spaces import ActionSpec, ObsSpec


class Transitions(NamedTuple):
    """The rollout's tensors that an environment reads and writes, whole, so that it finds its rows by itself.

    Attributes:
        obs: [T + 1, N, *obs] obs[t + 1] is where to act after step t (first obs of a new episode after an end).
        actions: [T, N, *action] as the distribution made them; read.
        rewards: [T, N] raw.
        terminated: [T, N] bool: the task ended, the future is worth nothing.
        truncated: [T, N] bool: cut short, the future is worth V of the last observation.
        valid: [T, N] bool: False where the vector env only reset (next-step autoreset); None: all True.
    """

    obs: Tensor
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    truncated: Tensor
    valid: Tensor | None

    @classmethod
    def allocate(cls, n_steps: int, env: VecEnv, device: torch.device) -> Transitions:
        """Storage for `n_steps` of `env`, with zeros in it so that memory is really there before training starts."""
        dist, rows = env.action_spec.distribution, (n_steps, env.n_envs)

        def flags() -> Tensor:
            return torch.zeros(rows, dtype=torch.bool, device=device)

        return cls(
            obs=env.obs_spec.blank(n_steps + 1, env.n_envs, device=device),
            actions=torch.zeros((*rows, *dist.action_shape), dtype=dist.action_dtype, device=device),
            rewards=torch.zeros(rows, device=device),
            terminated=flags(),
            truncated=flags(),
            valid=flags() if env.fillers else None,
        )


class Cuts(NamedTuple):
    """Last observations of episodes that were cut in a rollout, kept where the environments are: on the device.

    An environment with a time limit of L steps can be cut at most (T - 1) // L + 1 = C times in T steps.

    Attributes:
        step: [] int64, steps taken in this rollout.
        obs: [C, N, *obs] last observation of the k-th episode that was cut.
        steps: [C, N] int64, the step that cut it; T where there is none.
        made: [N] int64, how many were cut so far.
    """

    step: Tensor
    obs: Tensor
    steps: Tensor
    made: Tensor

    @classmethod
    def allocate(
        cls, n_steps: int, n_envs: int, obs_spec: ObsSpec, max_steps: int | None, device: torch.device
    ) -> Cuts:
        """For rollouts of `n_steps` in environments whose time limit is `max_steps` (None: none)."""
        most = 0 if max_steps is None else (n_steps - 1) // max_steps + 1
        step, made = (torch.zeros(shape, dtype=torch.int64, device=device) for shape in ((), (n_envs,)))
        steps = torch.full((most, n_envs), n_steps, device=device)
        return cls(step, obs_spec.blank(most, n_envs, device=device), steps, made)

    def clear(self, n_steps: int) -> None:
        """A rollout of `n_steps` begins."""
        self.step.zero_()
        self.made.zero_()
        self.steps.fill_(n_steps)


class VecEnv(Protocol):
    """N environments as the loop sees them.

    They are stepped in groups, one after the other: `send` starts a step of one, `wait` ends it, `store` writes it
    down. Most have one group; two let the policy act on one half while worker processes step the other.

    Attributes:
        n_envs: N.
        groups: slices of 0..N-1 that are stepped together.
        obs_spec: of one observation.
        action_spec: of one action.
        fillers: whether some steps are only resets (next-step autoreset), so that `Transitions.valid` is written.
        notes: what the user should know of this environment, a line each.
        final_obs: [N, *obs] last observations, true in the rows that the last `store` named.
    """

    n_envs: int
    groups: Sequence[slice]
    obs_spec: ObsSpec
    action_spec: ActionSpec
    fillers: bool
    notes: Sequence[str]
    final_obs: Tensor

    @property
    def obs_bounds(self) -> tuple[Tensor, Tensor] | None:
        """Lowest and highest observations [*obs] that the space allows; None: it says no more than their type."""

    @property
    def resumable(self) -> Resumable:
        """How these environments go on after a resume."""

    def state_dict(self) -> dict[str, Any]:
        """What that takes: tensors and JSON-able values; empty where they restart."""

    def load_state_dict(self, saved: Mapping[str, Any], obs: Tensor) -> None:
        """Go on from there, where the observations were `obs` [N, *obs].

        Raises:
            EnvError: what is no such state, or leads to other observations.
        """

    def restart_messages(self) -> Sequence[str]:
        """Lines about environments that failed and were made anew since the last call."""

    @property
    def restarts(self) -> int:
        """How many times an environment failed and was made anew, or a worker was lost and replaced."""

    @property
    def cuts(self) -> Cuts | None:
        """Episodes cut in the whole rollout, of environments that never tell the host; None: `store` tells."""

    @property
    def state(self) -> Mapping[str, Tensor] | None:
        """Every tensor that a step changes beside the rollout, if it can be recorded in a graph; else None."""

    def reset(self, seeds: np.ndarray[Any, Any]) -> Tensor:
        """Start every environment with its seed, [N] as `env_seeds` draws them; returns obs [N, *obs]."""

    def attach(self, transitions: Transitions) -> None:
        """Take these tensors as the storage of all steps to come."""

    def send(self, t: int, group: int) -> None:
        """Begin step t of a group, with its part of actions[t]."""

    def wait(self, group: int) -> None:
        """End the step that `send` began."""

    def store(self, t: int, group: int) -> Sequence[int]:
        """Write the step's results into row t (obs: t + 1); returns the environments whose episode was cut.

        Cut means truncated and not terminated. Empty where environments reset at the next step, for then the next
        row holds the last observation.
        """

    def close(self) -> None:
        """Let go of processes and windows."""


def env_seeds(stream: np.random.SeedSequence, n_envs: int, rank: int = 0, size: int = 1) -> np.ndarray[Any, Any]:
    """Seeds [N] int64 of one process's environments, all those of `size` processes being different."""
    # 31 bits: what every environment takes; drawn without repetition, so that no two environments are twins
    every = np.random.default_rng(stream).choice(2**31 - 1, n_envs * size, replace=False)
    return every[rank * n_envs : (rank + 1) * n_envs].astype(np.int64)


class Step(NamedTuple):
    """One step of N environments, for whoever keeps no rollout; overwritten by the next one."""

    obs: Tensor  # [N, *obs] where to act next
    rewards: Tensor  # [N] raw
    terminated: Tensor  # [N] bool
    truncated: Tensor  # [N] bool
    valid: Tensor | None  # [N] bool
    cut: Sequence[int]  # whose last observation is in final_obs
    final_obs: Tensor  # [N, *obs]


def stepper(env: VecEnv, device: torch.device) -> Callable[[Tensor], Step]:
    """A function that steps `env` once with actions [N, *action]."""
    to = Transitions.allocate(1, env, device)
    env.attach(to)

    def step(actions: Tensor) -> Step:
        to.actions[0].copy_(actions)
        cut: list[int] = []
        for group in range(len(env.groups)):
            env.send(0, group)
        for group in range(len(env.groups)):
            env.wait(group)
            cut += env.store(0, group)
        valid = None if to.valid is None else to.valid[0]
        return Step(to.obs[1], to.rewards[0], to.terminated[0], to.truncated[0], valid, cut, env.final_obs)

    return step
