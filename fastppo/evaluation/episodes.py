"""Whole episodes with a policy that doesn't learn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastppo.envs.vec_env import Step, VecEnv, env_seeds, stepper
from fastppo.policies.policy import Policy

_MOST_STEPS = 100_000  # of an episode; ALE's end after 27,000


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Whole episodes of a policy.

    Attributes:
        returns: undiscounted, raw.
        lengths: in steps.
        cut: episodes that were ended here after 100,000 steps, with the return they had: a policy without noise may
            stand still for ever where there is no time limit. Their environments played no further ones.
    """

    returns: list[float]
    lengths: list[int]
    cut: int = 0

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(np.mean(self.returns))

    @property
    def remark(self) -> str:
        """Of episodes that were cut, if any."""
        return f"; {self.cut} of {len(self.returns)} episodes were cut after {_MOST_STEPS:,} steps" if self.cut else ""

    @property
    def std(self) -> float:
        """Standard deviation of the returns over episodes."""
        return float(np.std(self.returns))


class EpisodePlayer:
    """Plays whole episodes in an environment; each call begins anew, from the same seeds."""

    def __init__(self, env: VecEnv, policy: Policy, device: torch.device, stream: np.random.SeedSequence) -> None:
        """Play `policy`, which lies on `device`, in `env`, whose seeds come from `stream`."""
        self._env, self._policy, self._device = env, policy, device
        self._seeds = env_seeds(stream, env.n_envs)
        self._step: Callable[[Tensor], Step] | None = None

    def __call__(self, episodes: int, generator: torch.Generator | None = None) -> Evaluation:
        """Play `episodes`; the most probable actions, or ones sampled by `generator`.

        Each environment plays its share from its first episode on, so that short episodes are not preferred.
        """
        n = self._env.n_envs
        share = np.full(n, episodes // n) + (np.arange(n) < episodes % n)
        played: list[list[tuple[float, int]]] = [[] for _ in range(n)]
        total, length = np.zeros(n), np.zeros(n, int)
        obs = self._env.reset(self._seeds)
        if self._step is None:
            self._step = stepper(self._env, obs.device)
        cut = 0
        noise = torch.zeros((n, self._policy.distribution.noise_size), device=self._device)
        while any(len(mine) < k for mine, k in zip(played, share, strict=True)):
            raw = obs.to(self._device, self._env.obs_spec.dtype)
            if generator is None:
                actions = self._policy.mode(raw)
            else:
                self._policy.distribution.fill_noise(noise, generator)
                actions = self._policy.act(raw, noise).actions
            step = self._step(actions)
            real = np.ones(n, bool) if step.valid is None else step.valid.numpy(force=True)
            total[real] += step.rewards.numpy(force=True)[real]
            length += real
            for i in np.flatnonzero((step.terminated | step.truncated).numpy(force=True)):
                played[i].append((float(total[i]), int(length[i])))
                total[i] = length[i] = 0
            for i in np.flatnonzero(length >= _MOST_STEPS):
                if len(played[i]) < share[i]:
                    played[i].append((float(total[i]), int(length[i])))
                    share[i], cut = len(played[i]), cut + 1
                length[i] = 0
            obs = step.obs
        kept = [pair for mine, k in zip(played, share, strict=True) for pair in mine[:k]]
        return Evaluation([r for r, _ in kept], [k for _, k in kept], cut)

    def close(self) -> None:
        """Close the environment."""
        self._env.close()
