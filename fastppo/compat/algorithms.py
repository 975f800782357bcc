"""The algorithms by the names, constructors and methods that scripts know."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from fastppo.compat.algorithm import Algorithm
from fastppo.errors import ConfigError
from fastppo.profiles import PROFILES, Profile


def _changed(profile: Profile, program: str, without: Sequence[str] = (), **defaults: Any) -> Profile:  # noqa: ANN401
    """Return a profile without some keywords, and with other defaults of others."""
    keywords = tuple(
        dataclasses.replace(keyword, default=defaults.get(keyword.name, keyword.default))
        for keyword in profile.keywords
        if keyword.name not in without
    )
    return dataclasses.replace(profile, program=program, keywords=keywords)


class PPO(Algorithm):
    """stable-baselines3's PPO."""

    profile = PROFILES["sb3"]


class RecurrentPPO(Algorithm):
    """sb3-contrib's RecurrentPPO: policies with an LSTM."""

    profile = _changed(
        PROFILES["sb3"],
        "sb3-contrib 2.9.2, RecurrentPPO",
        ("rollout_buffer_class", "rollout_buffer_kwargs"),
        n_steps=128,
        batch_size=128,
    )
    recurrent = True


class MaskablePPO(Algorithm):
    """sb3-contrib's MaskablePPO: chooses among allowed actions only."""

    profile = _changed(PROFILES["sb3"], "sb3-contrib 2.9.2, MaskablePPO", ("use_sde", "sde_sample_freq"))
    masks = True

    def learn(  # type: ignore[override] # use_masking before progress_bar, as there
        self,
        total_timesteps: int,
        callback: Any = None,  # noqa: ANN401 - as in Algorithm
        log_interval: int = 1,
        tb_log_name: str | None = None,
        reset_num_timesteps: bool = True,
        use_masking: bool = True,
        progress_bar: bool = False,
    ) -> Self:
        """Train; see `Algorithm.learn`.

        Raises:
            ConfigError: use_masking=False.
        """
        if not use_masking:
            raise ConfigError("use_masking=False can't be honoured: the policy has the masks; use PPO instead.")
        return super().learn(
            total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar=progress_bar
        )

    def predict(
        self,
        observation: Any,  # noqa: ANN401 - as in Algorithm
        state: Any = None,  # noqa: ANN401 - as in Algorithm
        episode_start: Any = None,  # noqa: ANN401 - as in Algorithm
        deterministic: bool = False,
        action_masks: Any = None,  # noqa: ANN401 - array-like
    ) -> tuple[np.ndarray[Any, Any], tuple[np.ndarray[Any, Any], ...] | None]:
        """Return actions and state; see `Algorithm.predict`. `action_masks`: the allowed actions, [A] or [B, A]."""
        return self._act(observation, state, episode_start, deterministic, action_masks)


class _StableBaselines(Algorithm):
    """Base of PPO1 and PPO2, the algorithms of stable-baselines."""

    legacy = True

    def predict(
        self,
        observation: Any,  # noqa: ANN401 - as in Algorithm
        state: Any = None,  # noqa: ANN401 - as in Algorithm
        mask: Any = None,  # noqa: ANN401 - array-like
        deterministic: bool = False,
    ) -> tuple[np.ndarray[Any, Any], tuple[np.ndarray[Any, Any], ...] | None]:
        """Return actions and state; see `Algorithm.predict`. `mask`: whether an episode starts here, a bool or [B]."""
        return self._act(observation, state, mask, deterministic)

    def _steps_counted(self, iteration: int) -> int:
        """Return the steps that the schedules of iteration 0, 1, ... count: those before it."""
        return iteration * self.config.batch_size


class PPO2(_StableBaselines):
    """stable-baselines' PPO2."""

    profile = PROFILES["ppo2"]


class PPO1(_StableBaselines):
    """stable-baselines' PPO1, in one process; torchrun starts several."""

    profile = PROFILES["ppo1"]
