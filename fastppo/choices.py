"""From the settings that were given to those that run: what the spaces, the machine and a measurement decide."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from fastppo.config import Config, parse_schedule, resolve
from fastppo.envs.choose import env_key, recall
from fastppo.envs.registry import Probe, choose_vectorization
from fastppo.errors import ConfigError
from fastppo.policies.build import default_network
from fastppo.presets import TUNED
from fastppo.runtime.device import machine_name


def settle(config: Config, found: Probe, device: torch.device, *, custom_policy: bool) -> tuple[Config, list[str]]:
    """The config with every choice made that comes before anything is built, and notes about them.

    Raises:
        ConfigError: settings that don't go together.
    """
    if found.vector is not None and config.n_envs is None:
        config = dataclasses.replace(config, n_envs=found.vector.num_envs)
    resolved = resolve(config, found.kind, atari=found.atari, reward_threshold=found.reward_threshold)
    changes: dict[str, Any] = {"device": str(device)}
    if config.network == "auto" and not custom_policy:
        changes["network"] = default_network(found.obs_spec)
    if custom_policy and config.network != "auto":
        raise ConfigError(f"network={config.network} and a policy module are both given; leave network at auto.")
    if found.obs_spec.kind != "vector" and config.normalize_obs is None:
        changes["normalize_obs"] = False
    if config.eval_every is not None and found.vector is not None:
        raise ConfigError(
            "eval_every needs environments of its own, but make_env returned a vector environment; "
            "return a single environment from make_env, or leave eval_every out."
        )
    c = dataclasses.replace(resolved, **changes)
    notes = []
    if config.target_return == "threshold" and c.target_return is None:
        notes.append(f"target_return threshold: {found.name} has none, so all steps are run.")
    if config.preset == "tuned" and config.env_id not in TUNED:
        notes.append(f"preset tuned: there is no measured setting for {found.name}; CleanRL's is taken.")
    if c.vectorization != "auto":
        return c, notes
    n_envs = c.n_envs
    assert n_envs is not None, "resolved"
    key = env_key(found.name, c.env_kwargs)
    # what `fastppo bench --save` found on this machine, or else what a short measurement says
    saved = None if found.factory is None or found.factory.make else recall(key, machine_name(), n_envs)
    if saved is not None:
        kept: dict[str, Any] = {name: saved.get(name) for name in ("vectorization", "workers")}
        c = dataclasses.replace(c, **kept, half_batches=bool(saved.get("half_batches")))
        return c, [*notes, f"vectorization {saved['vectorization']}: {saved['reason']}"]
    vectorization, why = choose_vectorization(found, n_envs)
    return dataclasses.replace(c, vectorization=vectorization), [*notes, why]


def schedule_of(c: Config, name: str) -> tuple[str, float, float]:
    """The coefficient `name` as shape, start and end."""
    value = c.schedule(name)
    return parse_schedule(value, name) if isinstance(value, str) else ("constant", value, value)


def target_of(c: Config) -> float | None:
    """The mean return that ends the run, once "threshold" has become a number."""
    return c.target_return if isinstance(c.target_return, (int, float)) else None
