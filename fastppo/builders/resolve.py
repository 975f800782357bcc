"""Resolve a config: make the choices that depend on the spaces, the machine and a measurement."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from fastppo.config import Config, check_sequences, fill_defaults, known, parse_schedule
from fastppo.envs.auto_vectorization import env_key, recall
from fastppo.envs.make_envs import EnvInfo, choose_vectorization, supports
from fastppo.errors import ConfigError
from fastppo.policies.policy_spec import default_network
from fastppo.profiles import MEASURED
from fastppo.runtime.device import machine_name
from fastppo.runtime.distributed import World
from fastppo.runtime.graphs import RECORDERS


def resolve_config(
    config: Config,
    env_info: EnvInfo,
    device: torch.device,
    *,
    policy: nn.Module | None = None,
    world: World | None = None,
) -> tuple[Config, list[str]]:
    """Return the config with every choice that precedes building made, and notes about the choices.

    Args:
        config: settings as the user gave them.
        env_info: of the environment.
        device: to train on.
        policy: the user's own network; None: the config's.
        world: the ranks that train together; the main one measures for all. None: a single rank.

    Raises:
        ConfigError: settings contradict each other.
    """
    custom_memory = hasattr(policy, "initial_state")
    if env_info.vector is not None and config.n_envs is None:
        config = dataclasses.replace(config, n_envs=env_info.vector.num_envs)
    if not env_info.from_id:  # so that neither the default id nor its profile is taken for make_env's environment
        config = dataclasses.replace(config, env_id=env_info.name)
    c = fill_defaults(
        config,
        env_info.kind,
        atari=env_info.atari,
        reward_threshold=env_info.reward_threshold,
        custom_memory=custom_memory,
    )
    if custom_memory:
        check_sequences(c)
    elif config.segment_length is not None and config.memory == "none":
        raise ConfigError("segment_length needs a memory: --memory lstm, gru or mingru; or leave it out.")
    if policy is not None:
        _check_own_network(config)
    _check_env(config, env_info)
    if config.compile == "graph" and device.type not in RECORDERS:
        raise ConfigError(
            f"compile=graph captures CUDA graphs, but the device is {device.type}; use compile=auto, fused, on or off."
        )
    changes: dict[str, Any] = {}
    if config.device == "auto":  # a resumed run keeps the device type; each rank chooses its own index
        changes["device"] = device.type
    if config.network == "auto" and policy is None:
        changes["network"] = default_network(env_info.obs_spec)
    if config.normalize_obs is None and all(leaf.kind != "vector" for leaf in env_info.obs_spec.seen):
        changes["normalize_obs"] = False
    c = dataclasses.replace(c, **changes)
    notes = _notes(config, c, env_info, has_memory=custom_memory or c.memory != "none")
    if c.vectorization != "auto":
        return c, notes
    chosen, why = (world or World()).shared(lambda: _fastest_vectorization(c, env_info))
    return dataclasses.replace(c, **chosen), [*notes, why]


def _check_own_network(config: Config) -> None:
    """Refuse settings of a network that the user's own module replaces."""
    if config.network != "auto":
        raise ConfigError(f"network={config.network} and a policy module are both given; leave network at auto.")
    if config.memory != "none":
        raise ConfigError(
            f"memory={config.memory} and a policy module are both given; give the module an initial_state of its own "
            "(docs/memory.md), and leave memory out."
        )
    if config.state_dependent_std:
        raise ConfigError(
            "state_dependent_std and a policy module are both given; the module itself returns the log standard "
            "deviations, of the state or not: leave it out."
        )


def _check_env(config: Config, env_info: EnvInfo) -> None:
    """Refuse settings that don't fit the environment."""
    if config.state_dependent_std and env_info.action_spec.kind != "box":
        raise ConfigError(
            f"state_dependent_std needs Box actions, but the action space is {env_info.action_spec.kind}; leave it out."
        )
    if config.eval_every is not None and env_info.vector is not None:
        raise ConfigError(
            "eval_every needs environments of its own, but make_env returned a vector environment; "
            "return a single environment from make_env, or leave eval_every out."
        )


def _notes(config: Config, c: Config, env_info: EnvInfo, *, has_memory: bool) -> list[str]:
    """Return notes on what the environment gives, and on settings of `config` that `c` changes."""
    notes = [*env_info.obs_spec.notes, *([env_info.action_spec.note] if env_info.action_spec.note else [])]
    if env_info.obs_spec.has_mask:
        source = {"key": "the observation key action_mask", "method": "action_masks()", "info": 'info["action_mask"]'}
        notes.append(f"action masks: from {source[env_info.obs_spec.leaves[-1].mask_source or 'key']}.")
    if config.target_return == "threshold" and c.target_return is None:
        notes.append(f"target_return threshold: {env_info.name} has none; training runs all steps.")
    if config.profile in MEASURED and config.env_id not in MEASURED[config.profile].by_env:
        notes.append(f"profile {config.profile}: no measured setting for {env_info.name}; CleanRL's defaults are used.")
    if has_memory and config.n_minibatches is None and c.n_minibatches == 1:
        notes.append(
            "n_minibatches 1: a minibatch holds whole sequences, and a rollout is only one; give --segment-length or "
            "more environments for more steps per update."
        )
    return notes


def _fastest_vectorization(c: Config, env_info: EnvInfo) -> tuple[dict[str, Any], str]:
    """Return the settings of the fastest vectorisation, and the reason."""
    n_envs = known(c.n_envs)
    # use the result of `fastppo bench --save` on this machine, or else measure briefly now
    name = env_key(env_info.name, c.env_kwargs, c.wrappers)
    saved = recall(name, machine_name(), n_envs) if env_info.from_id else None
    needs = {"timeout": c.env_timeout is not None, "restarts": c.on_env_error == "restart"}
    if saved is not None and supports(saved["vectorization"], **needs):
        kept: dict[str, Any] = {name: saved.get(name) for name in ("vectorization", "workers")}
        kept["half_batches"] = bool(saved.get("half_batches"))
        return kept, f"vectorization {saved['vectorization']}: {saved['reason']}"
    vectorization, why = choose_vectorization(env_info, n_envs, **needs)
    return {"vectorization": vectorization}, why


def schedule_of(c: Config, name: str) -> tuple[str, float, float]:
    """Return the schedule of coefficient `name` as (shape, start, end)."""
    value = c.schedule(name)
    return parse_schedule(value, name) if isinstance(value, str) else ("constant", value, value)


def target_of(c: Config) -> float | None:
    """Return the mean return that ends the run; None if there is none."""
    return c.target_return if isinstance(c.target_return, (int, float)) else None
