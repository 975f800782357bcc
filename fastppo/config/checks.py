"""Checks of settings: types, ranges, and combinations that contradict each other."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.config.plain_values import accepts, choices, describe
from fastppo.config.schedules import parse_adaptive_rate, parse_schedule
from fastppo.config.setting import Setting, known
from fastppo.errors import ConfigError
from fastppo.profiles import profile_settings

if TYPE_CHECKING:
    from fastppo.config.config import Config

MAX_FLOAT32 = 3.4e38  # rounded down
MIN_FLOAT32 = 1.2e-38  # of full precision, rounded up


def check_types(config: Config, types: Mapping[str, Any]) -> None:
    """Check each field against its annotation in `types`.

    Raises:
        ConfigError: a value of another type, with the nearest text that is allowed; or env_kwargs that JSON can't hold.
    """
    try:
        json.dumps(config.env_kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"env_kwargs={config.env_kwargs!r} can't be stored as JSON ({error}); use plain values."
        ) from None
    for name, hint in types.items():
        value = getattr(config, name)
        if not accepts(value, hint):
            near = ""
            if isinstance(value, str):
                match = difflib.get_close_matches(value.lower(), choices(hint), n=1)
                near = f"; did you mean {match[0]}?" if match else ""
            raise ConfigError(f"{name}={value!r} must be {describe(hint)}{near or '.'}")


def check_ranges(config: Config, settings: Mapping[str, Setting]) -> None:
    """Check every number, also those of schedules and lists, against the range of its setting.

    Raises:
        ConfigError: a number outside, with the nearest valid one; or text that is no schedule.
    """
    for name, setting in settings.items():
        value = getattr(config, name)
        if isinstance(value, str):
            adaptive = parse_adaptive_rate(value) if name == "learning_rate" else None
            numbers = adaptive or (parse_schedule(value, name)[1:] if setting.scheduled else ())
        else:
            numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, (int, float)):
                _check_number(name, list(value) if isinstance(value, tuple) else value, number, setting)


def _check_number(name: str, given: object, number: float, setting: Setting) -> None:
    if isinstance(number, int) and abs(number) >= 2**1000:  # too large for a float
        raise ConfigError(f"{name} has {len(str(number)):,} digits; give a smaller number.")
    if math.isnan(number) or math.isinf(number):
        raise ConfigError(f"{name}={given!r} must be a finite number.")
    if setting.above is not None and number <= setting.above:
        raise ConfigError(f"{name}={given!r} must be greater than {setting.above}.")
    if setting.at_least is not None and number < setting.at_least:
        bound = setting.at_least
        raise ConfigError(f"{name}={given!r} must be at least {bound}; nearest valid value: {bound}.")
    if setting.at_most is not None and number > setting.at_most:
        bound = setting.at_most
        raise ConfigError(f"{name}={given!r} must be at most {bound}; nearest valid value: {bound}.")
    if setting.changes == "results" and 0 < abs(number) < MIN_FLOAT32:
        raise ConfigError(
            f"{name}={given!r} is too small for a float32, which holds numbers from {MIN_FLOAT32} in size; give a "
            "larger one."
        )
    if setting.changes == "results" and abs(number) > MAX_FLOAT32:
        raise ConfigError(
            f"{name}={given!r} doesn't fit a float32, which holds up to {MAX_FLOAT32} in size; give one nearer to 0."
        )


def check_texts(config: Config) -> None:
    """Check the settings that are names and lists.

    Raises:
        ConfigError: a wrapper, run name or device that can't be one, or an MLP without layers.
    """
    if not config.hidden_sizes:
        raise ConfigError("hidden_sizes=[] must name at least one layer, such as 64 64.")
    for wrapper in config.wrappers:
        module, _, attribute = wrapper.partition(":")
        if not all(part.isidentifier() for part in module.split(".")) or not attribute.isidentifier():
            raise ConfigError(
                f"wrappers: {wrapper!r} must be MODULE:NAME, such as gymnasium.wrappers:FlattenObservation."
            )
    if config.name != Path(config.name).name or config.name.startswith(".") or "\0" in config.name or not config.name:
        raise ConfigError(f"name={config.name!r} must be a plain folder name, without '/', '..' or a leading dot.")
    device = config.device.split(":")
    if (
        device[0] not in ("auto", "cpu", "cuda")
        or len(device) > 2
        or (len(device) == 2 and not (device[0] == "cuda" and device[1].isdecimal()))
    ):
        raise ConfigError(f"device={config.device!r} must be auto, cpu, cuda or cuda:K.")


def check_combinations(config: Config, defaults: Mapping[str, Any]) -> None:
    """Check settings that depend on each other, as far as they are given.

    Args:
        config: the settings.
        defaults: of every setting; a value other than its default is given.

    Raises:
        ConfigError: two settings contradict each other, or one has no effect.
    """
    _check_schedules(config)
    _check_followers_of_the_kl(config, defaults)
    _check_exploration(config, defaults)
    _check_rewards_and_policy(config)
    _check_stepping(config)
    if None in (config.n_envs, config.n_steps, config.n_minibatches):
        return
    if config.memory != "none":
        check_sequences(config)
    else:
        _check_minibatches(config)


def _check_schedules(config: Config) -> None:
    if config.anneal_lr and isinstance(config.learning_rate, str):
        raise ConfigError(f"anneal_lr and learning_rate={config.learning_rate!r} both give a schedule; keep one.")
    if config.anneal_clip and isinstance(config.clip_coef, str):
        raise ConfigError(f"anneal_clip and clip_coef={config.clip_coef!r} both give a schedule; keep one.")


def _check_followers_of_the_kl(config: Config, defaults: Mapping[str, Any]) -> None:
    """Check the settings of an adaptive learning rate and of a penalty on the KL."""
    rate = config.learning_rate
    if rate is None:
        rate = profile_settings(config.profile).get("learning_rate")
    adaptive, penalty = parse_adaptive_rate(rate) is not None, config.objective != "clip"
    for name, used, by in (
        ("adaptive_kl", adaptive, "an adaptive learning rate: --learning-rate adaptive:3e-4:1e-5:1e-2"),
        ("kl_coef", penalty, "a penalty: --objective penalty or clip_and_penalty"),
        ("penalty_kl", penalty, "a penalty: --objective penalty or clip_and_penalty"),
    ):
        if not used and getattr(config, name) != defaults[name]:
            raise ConfigError(f"{name}={getattr(config, name)!r} has no effect without {by}; or leave it out.")
    if (adaptive or penalty) and (config.update_epochs, config.n_minibatches) == (1, 1):
        name = f"objective={config.objective}" if penalty else f"learning_rate={config.learning_rate!r}"
        raise ConfigError(
            f"{name} with update_epochs=1 and n_minibatches=1: the only step of an update starts from the policy that "
            "acted, so the KL is always 0; use more epochs or minibatches."
        )


def _check_exploration(config: Config, defaults: Mapping[str, Any]) -> None:
    for name in ("rnd_coef", "rnd_gamma", "rnd_proportion"):
        if not config.rnd and getattr(config, name) != defaults[name]:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} has no effect without --rnd; add it, or leave {name} out."
            )


def _check_rewards_and_policy(config: Config) -> None:
    if config.sign_rewards and config.normalize_rewards:
        raise ConfigError("sign_rewards and normalize_rewards both rescale the rewards; switch one off.")
    if config.rescale_actions and config.action_distribution != "gaussian":
        raise ConfigError(
            f"rescale_actions with action_distribution={config.action_distribution}, whose actions are scaled to the "
            "bounds anyway; leave rescale_actions out."
        )
    if config.state_dependent_std and config.action_distribution == "beta":
        raise ConfigError(
            "state_dependent_std with action_distribution=beta, whose parameters all depend on the state already; "
            "leave state_dependent_std out."
        )
    if config.critic_obs_keys and config.shared_trunk:
        raise ConfigError(
            "critic_obs_keys with shared_trunk: the policy would read them through the shared layers; leave one out."
        )
    if both := set(config.obs_keys) & set(config.critic_obs_keys):
        raise ConfigError(f"obs_keys and critic_obs_keys both name {min(both)!r}; the critic reads both lists.")


def _check_stepping(config: Config) -> None:
    """Check what the chosen vectorisation can't do."""
    if config.vectorization != "pool" and (config.workers or config.half_batches):
        name = "workers" if config.workers else "half_batches"
        raise ConfigError(
            f"{name} needs vectorization=pool, but vectorization={config.vectorization}; leave it out or use the pool."
        )
    if config.half_batches and config.n_envs == 1:
        raise ConfigError("half_batches=True with n_envs=1: one environment can't be split; leave it out.")
    if config.on_env_error == "restart" and config.vectorization not in ("auto", "sync", "pool"):
        raise ConfigError(
            f"on_env_error=restart needs vectorization=sync or pool, but vectorization={config.vectorization}; "
            "leave it out or use one of them."
        )
    if config.env_timeout is not None and config.vectorization not in ("auto", "pool", "async"):
        raise ConfigError(
            f"env_timeout needs worker processes, but vectorization={config.vectorization} has none; "
            "leave it out or use the pool."
        )
    if config.exact_resume and config.resume_envs == "restart":
        raise ConfigError("exact_resume with resume_envs=restart: a resume would start new episodes; leave one out.")
    if config.wrappers and config.vectorization in ("native", "envpool", "tensor"):
        raise ConfigError(
            f"wrappers need Gymnasium environments, but vectorization={config.vectorization} steps its own; "
            "use sync, pool, async or auto."
        )
    if config.act_device == "cpu" and config.vectorization == "tensor":
        raise ConfigError(
            "act_device=cpu with vectorization=tensor: these environments run on the training device; leave it out."
        )
    if not all(key.strip() for key in config.log_info):
        raise ConfigError("log_info holds an empty name; name keys of info, such as success or 'terms/*'.")
    if config.log_info and config.vectorization == "tensor":
        raise ConfigError(
            "log_info with vectorization=tensor: these environments give no info; use sync, pool or async, or leave it "
            "out."
        )


def _check_minibatches(config: Config) -> None:
    batch, parts = config.batch_size, known(config.n_minibatches)
    if batch % parts:
        raise ConfigError(
            f"n_minibatches={parts} does not divide the batch of {batch} "
            f"(n_envs={config.n_envs} x n_steps={config.n_steps}); nearest that do: "
            f"{_nearest_divisors(batch, parts)}."
        )


def check_sequences(config: Config) -> None:
    """Check that the rollouts of a filled config can be cut into sequences, and these into minibatches.

    Raises:
        ConfigError: they can't.
    """
    n_steps, parts = known(config.n_steps), known(config.n_minibatches)
    length = config.segment_length or n_steps
    if n_steps % length:
        raise ConfigError(
            f"segment_length={length} does not divide n_steps={n_steps}; nearest that do: "
            f"{_nearest_divisors(n_steps, length)}."
        )
    sequences = config.batch_size // length
    if sequences % parts:
        raise ConfigError(
            f"n_minibatches={parts} does not divide the {sequences} sequence{'s' if sequences > 1 else ''} of {length} "
            f"steps of a rollout, which stay whole; nearest that do: {_nearest_divisors(sequences, parts)}; or choose "
            "another --segment-length."
        )


def _nearest_divisors(whole: int, part: int) -> str:
    """Return the divisors of `whole` next to `part`, as text."""
    below = largest_divisor(whole, part)
    above = next((d for d in range(part, whole + 1) if whole % d == 0), None)
    return f"{below}, {above}" if above else f"{below}"


def largest_divisor(whole: int, at_most: int) -> int:
    """Return the largest divisor of `whole` up to `at_most`."""
    return max(d for d in range(1, min(at_most, whole) + 1) if whole % d == 0)
