"""Fill the settings that are not given: by the kind of environment, or from a profile."""

from __future__ import annotations

import dataclasses

from fastppo.config.checks import largest_divisor
from fastppo.config.config import DEFAULTS, Config
from fastppo.config.setting import known
from fastppo.errors import ConfigError
from fastppo.profiles import CLEANRL, MEASURED, Kind, profile_settings


def fill_defaults(
    config: Config,
    kind: Kind,
    *,
    atari: bool = False,
    reward_threshold: float | None = None,
    custom_memory: bool = False,
) -> Config:
    """Fill every setting that was not given.

    Args:
        config: settings as the user gave them.
        kind: of the environment: "image" by its observations, else "continuous" or "discrete" by its actions.
        atari: whether the environment is an ALE game; if so, sign_rewards is on by default.
        reward_threshold: the environment's own, for `target_return="threshold"`.
        custom_memory: whether the policy is a module of the user's own, with memory.

    Returns:
        A config in which None only stands where it means "none" (target_kl, target_return, ...).

    Raises:
        ConfigError: n_minibatches doesn't divide the batch, or settings contradict each other.
    """
    defaults = CLEANRL[kind] | {"sign_rewards": atari}
    if config.profile in MEASURED:
        defaults |= MEASURED[config.profile].by_env.get(config.env_id, {})
    elif config.profile != "cleanrl":  # which is CLEANRL, by kind
        profile = profile_settings(config.profile)
        rows = profile.pop("minibatch_size", None)
        defaults |= {name: value for name, value in profile.items() if DEFAULTS[name] is None}
        if rows is not None:
            n_envs, n_steps = (getattr(config, name) or defaults[name] for name in ("n_envs", "n_steps"))
            defaults["n_minibatches"] = largest_divisor(n_envs * n_steps, max(1, n_envs * n_steps // rows))
    # a schedule replaces the short form
    if isinstance(config.learning_rate, str):
        defaults["anneal_lr"] = False
    if isinstance(config.clip_coef, str):
        defaults["anneal_clip"] = False
    if config.normalize_rewards:
        defaults["sign_rewards"] = False
    if config.sign_rewards:
        defaults["normalize_rewards"] = False
    changes = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.target_return == "threshold":
        changes["target_return"] = reward_threshold
    if "n_minibatches" in changes and (custom_memory or config.memory != "none"):
        whole = dataclasses.replace(config, **changes | {"n_minibatches": 1})
        sequences = whole.batch_size // (config.segment_length or known(whole.n_steps))
        changes["n_minibatches"] = largest_divisor(max(1, sequences), changes["n_minibatches"])
    return dataclasses.replace(config, **changes)


def count_iterations(config: Config, processes: int) -> int:
    """Return the number of whole iterations of a filled config; an iteration is one rollout on each process.

    Raises:
        ConfigError: there is none.
    """
    steps, batch = known(config.total_timesteps), config.batch_size * processes
    if steps < batch:
        ranks = f" on each of {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"total_timesteps={steps:,} is less than one iteration of {batch:,} steps (n_envs={config.n_envs:,} x "
            f"n_steps={config.n_steps:,}{ranks}); train for at least {batch:,} steps, or reduce n_envs or n_steps."
        )
    return steps // batch
