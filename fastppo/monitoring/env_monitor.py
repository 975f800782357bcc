"""Watches the environments of a run: observations outside their space, restarts after failures."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastppo.envs.vec_env import VecEnv
from fastppo.errors import EnvError
from fastppo.monitoring.stats import Stats
from fastppo.ppo.metrics import Metrics
from fastppo.runtime.distributed import World


class EnvMonitor:
    """Reports environment failures after each iteration; raises EnvError once they exceed their limit."""

    def __init__(
        self,
        env: VecEnv,
        metrics: Metrics,
        world: World,
        device: torch.device,
        *,
        strict_obs: bool,
        max_restarts: int | None,
        say: Callable[[str], None],
    ) -> None:
        """Watch `env`.

        Args:
            env: the environments.
            metrics: the run's metrics.
            world: the ranks that train together.
            device: for counts that the ranks share.
            strict_obs: treat an observation outside its space as an error.
            max_restarts: maximum environment restarts, over all ranks; None: environments are never restarted.
            say: prints a line.
        """
        self._env, self._metrics, self._world, self._device = env, metrics, world, device
        self._strict_obs, self._max_restarts, self._say = strict_obs, max_restarts, say
        self._warned = False

    def __call__(self, stats: Stats) -> None:
        """Check the iteration of `stats`, and add `charts/env_restarts` to it.

        Raises:
            EnvError: an observation is outside its space and `strict_obs` is set, or `max_restarts` is exceeded.
        """
        if stats.scalars.get("charts/obs_outside_space") and not self._warned:
            self._warned = True
            where = self._metrics.outside() or "another process's environment left its observation_space"
            if self._strict_obs:
                raise EnvError(f"{where} of its run (--strict-obs).")
            self._say(f"warning: {where} of its run; charts/obs_outside_space counts further ones without a warning.")
        if self._max_restarts is None:
            return
        restarts = self._world.total(self._env.restarts, self._device)
        stats.scalars["charts/env_restarts"] = restarts
        for line in self._env.restart_messages():
            self._say(f"{line} {restarts} of {self._max_restarts} (--env-restarts).")
        if restarts > self._max_restarts:
            raise EnvError(f"environments failed {restarts} times; {self._max_restarts} are allowed (--env-restarts).")
