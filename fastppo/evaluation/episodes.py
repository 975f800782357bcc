"""Complete episodes with a fixed policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastppo.config import Config
from fastppo.envs.vec_env import Step, VecEnv, env_seeds, stepper
from fastppo.policies.policy import Policy
from fastppo.spaces.actions import ActionSpec
from fastppo.spaces.observations import ObsSpec

_Array = np.ndarray[Any, Any]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Complete episodes of a policy.

    Attributes:
        returns: undiscounted return of each episode, from unnormalised rewards.
        lengths: steps of each episode.
        cut: number of episodes that were cut after `max_steps`, with their return so far: without a time limit, a
            deterministic policy may never finish. An environment whose episode was cut plays no further ones.
        max_steps: maximum steps of an episode.
        normalizers: wrappers of the environment whose running statistics started from nothing in this evaluation.
    """

    returns: list[float]
    lengths: list[int]
    cut: int = 0
    max_steps: int = Config.eval_max_steps
    normalizers: tuple[str, ...] = ()

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def remark(self) -> str:
        """Remarks on the episodes that were cut, and on the statistics of normalising wrappers; or ""."""
        n = len(self.returns)
        cut = f"; {self.cut} of {n} episodes were cut after {self.max_steps:,} steps" if self.cut else ""
        fresh = f"; {' and '.join(self.normalizers)} began with fresh statistics" if self.normalizers else ""
        return cut + fresh

    @property
    def std(self) -> float:
        """Standard deviation of the returns."""
        return float(np.std(self.returns))


def begin_episode(
    policy: Policy, obs_spec: ObsSpec, action_spec: ActionSpec, device: torch.device, generator: torch.Generator | None
) -> Callable[[_Array], _Array]:
    """Return a function from each stored observation of one episode, in turn, to the environment's action.

    Args:
        policy: acts, on `device`.
        obs_spec: of the observations.
        action_spec: of the actions.
        device: of the policy.
        generator: samples actions; None: the most probable ones.
    """
    state, starts = policy.initial_state(1), torch.ones(1, dtype=torch.bool, device=device)

    def act(obs: _Array) -> _Array:
        nonlocal state
        row = torch.as_tensor(np.asarray(obs)[None]).to(device, obs_spec.dtype)
        step = policy.act(row, None if generator is None else policy.draw_noise(1, generator), state, starts)
        state = step.state
        starts.zero_()
        action: _Array = action_spec.to_env(step.actions.numpy(force=True))[0]
        return action

    return act


class EpisodePlayer:
    """Plays complete episodes in a vector environment; every call starts from the same seeds."""

    def __init__(
        self,
        env: VecEnv,
        policy: Policy,
        device: torch.device,
        stream: np.random.SeedSequence,
        *,
        max_steps: int,
        normalizers: tuple[str, ...] = (),
    ) -> None:
        """Play `policy`, which is on `device`, in `env`, seeded from `stream`; cut episodes after `max_steps`.

        See `Evaluation` on `normalizers`.
        """
        self._env, self._policy, self._device = env, policy, device
        self._max_steps, self._normalizers = max_steps, normalizers
        self._seeds = env_seeds(stream, env.n_envs)
        self._step: Callable[[Tensor], Step] | None = None

    def __call__(self, episodes: int, generator: torch.Generator | None = None) -> Evaluation:
        """Play `episodes` episodes, with the most probable actions, or with actions sampled by `generator`.

        Each environment plays a fixed number of episodes from its first on: taking the first `episodes` to end would
        favour short ones.
        """
        n = self._env.n_envs
        quota = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
        played: list[list[tuple[float, int]]] = [[] for _ in range(n)]
        total, length = np.zeros(n), np.zeros(n, int)
        obs = self._env.reset(self._seeds)
        if self._step is None:
            self._step = stepper(self._env, obs.device)
        cut = 0
        state = self._policy.initial_state(n)
        starts = torch.ones(n, dtype=torch.bool, device=self._device)
        while any(len(own) < k for own, k in zip(played, quota, strict=True)):
            raw = obs.to(self._device, self._env.obs_spec.dtype)
            noise = None if generator is None else self._policy.draw_noise(n, generator)
            action = self._policy.act(raw, noise, state, starts)
            state = action.state
            step = self._step(action.actions)
            real = np.ones(n, bool) if step.valid is None else step.valid.numpy(force=True)
            total[real] += step.rewards.numpy(force=True)[real]
            length += real
            for i in np.flatnonzero((step.terminated | step.truncated).numpy(force=True)):
                played[i].append((float(total[i]), int(length[i])))
                total[i] = length[i] = 0
            for i in np.flatnonzero(length >= self._max_steps):
                if len(played[i]) < quota[i]:
                    played[i].append((float(total[i]), int(length[i])))
                    quota[i], cut = len(played[i]), cut + 1
                length[i] = 0
            obs = step.obs
            ended = step.terminated | step.truncated if step.valid is None else ~step.valid
            starts = ended.to(self._device)
        kept = [episode for own, k in zip(played, quota, strict=True) for episode in own[:k]]
        returns, lengths = [r for r, _ in kept], [k for _, k in kept]
        return Evaluation(returns, lengths, cut, self._max_steps, self._normalizers)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
