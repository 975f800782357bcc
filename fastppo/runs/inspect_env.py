"""Inspect the environment that a config describes."""

from __future__ import annotations

from fastppo.config import Config
from fastppo.envs.make_envs import EnvInfo, Maker, Reading, inspect_env


def inspect_configured(config: Config, make_env: Maker | None = None) -> EnvInfo:
    """Inspect the environment of `config`, or the one that `make_env` makes; errors as for `inspect_env`."""
    return inspect_env(
        config.env_id,
        config.env_kwargs,
        make_env,
        config.wrappers,
        rescale_actions=config.rescale_actions,
        action_distribution=config.action_distribution,
        reading=reading_of(config),
    )


def reading_of(config: Config) -> Reading:
    """Return what a run with `config` reads of its observations."""
    return Reading(config.obs_keys, config.critic_obs_keys, config.action_masks == "auto")
