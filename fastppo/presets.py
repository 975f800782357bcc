"""Default settings per kind of environment, and tuned settings per environment id. Data only."""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["discrete", "image", "continuous"]

_CLEANRL_PPO: dict[str, Any] = {
    "total_timesteps": 500_000,
    "n_envs": 4,
    "n_steps": 128,
    "gamma": 0.99,
    "gae_lambda": 0.95,
    "n_minibatches": 4,
    "update_epochs": 4,
    "learning_rate": 2.5e-4,
    "anneal_lr": True,
    "clip_coef": 0.2,
    "anneal_clip": False,
    "value_clip": "max",
    "vf_coef": 0.5,
    "ent_coef": 0.01,
    "max_grad_norm": 0.5,
    "normalize_obs": False,
    "normalize_rewards": False,
    "sign_rewards": False,
}
CLEANRL: dict[Kind, dict[str, Any]] = {
    "discrete": _CLEANRL_PPO,
    "image": _CLEANRL_PPO | {"total_timesteps": 10_000_000, "n_envs": 8, "clip_coef": 0.1},
    "continuous": _CLEANRL_PPO
    | {
        "total_timesteps": 1_000_000,
        "n_envs": 1,
        "n_steps": 2048,
        "n_minibatches": 32,
        "update_epochs": 10,
        "learning_rate": 3e-4,
        "ent_coef": 0.0,
        "normalize_obs": True,
        "normalize_rewards": True,
    },
}

# Measured by benchmarks/presets.py; results in benchmarks/README.md.
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
}
