"""Settings that were measured here, by environment id."""

from __future__ import annotations

import dataclasses
from typing import Any

# Returns on seeds that chose none of them are in docs/results.md, Acrobot's in the file of its search. An entry that
# benchmarks/tuned.py made of a search by `fastppo tune` names its trials; CartPole's and Pendulum's were chosen by hand
# (benchmarks/README.md).
TUNED: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "total_timesteps": 100_000,
        "n_envs": 8,
        "n_steps": 32,
        "n_minibatches": 4,
        "update_epochs": 5,
        "gamma": 0.98,
        "gae_lambda": 0.8,
        "learning_rate": 2e-3,
        "anneal_clip": True,
        "value_clip": "off",
        "vf_coef": 1.0,
        "ent_coef": 0.0,
    },
    "Pendulum-v1": {
        "total_timesteps": 100_000,
        "n_envs": 8,
        "n_steps": 256,
        "n_minibatches": 16,
        "gamma": 0.9,
        "learning_rate": 1e-3,
        "anneal_lr": False,
        "value_clip": "off",
        "vf_coef": 1.0,
        "normalize_obs": False,
    },
    # trial 0 of 20, seeds 1 to 3: tune-acrobot_2core-cpu_2026-11-27.json
    "Acrobot-v1": {
        "total_timesteps": 100_000,
        "n_steps": 64,
        "gamma": 0.995,
        "gae_lambda": 0.8,
        "n_minibatches": 8,
        "update_epochs": 3,
        "learning_rate": 0.00431,
        "anneal_lr": False,
        "clip_coef": 0.1,
        "vf_coef": 1.44,
        "ent_coef": 0.00696,
        "max_grad_norm": 1.0,
    },
}


@dataclasses.dataclass(frozen=True)
class MeasuredProfile:
    """Settings that were measured here.

    Attributes:
        always: settings for every environment.
        by_env: the other settings, by environment id; CleanRL's defaults elsewhere.
    """

    always: dict[str, Any]
    by_env: dict[str, dict[str, Any]]


# Acrobot's settings were searched with the clipped objective; with a penalty, a first seed reached only -423
_PENALTY_ENVS = ("CartPole-v1", "Pendulum-v1")
MEASURED: dict[str, MeasuredProfile] = {
    "tuned": MeasuredProfile({}, TUNED),
    "tuned_penalty": MeasuredProfile(
        {"objective": "penalty", "penalty_kl": 0.01}, {env_id: TUNED[env_id] for env_id in _PENALTY_ENVS}
    ),
}
