"""CleanRL's defaults, which are those of fastppo, by kind of environment; and its profile."""

from __future__ import annotations

from typing import Any

from fastppo.profiles.profile import NETWORK, TIME_LIMIT, Keyword, Kind, Profile, fact, same

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

_NAMES = (
    ("total_timesteps", "total_timesteps", "Environment steps of the run."),
    ("num_envs", "n_envs", "Environments stepped together."),
    ("num_steps", "n_steps", "Steps per environment and rollout."),
    ("gamma", "gamma", "Discount factor."),
    ("gae_lambda", "gae_lambda", "Lambda of GAE."),
    ("num_minibatches", "n_minibatches", "Minibatches per epoch."),
    ("update_epochs", "update_epochs", "Passes over each rollout."),
    ("learning_rate", "learning_rate", "Adam's step size."),
    ("anneal_lr", "anneal_lr", "Anneal the learning rate to 0."),
    ("clip_coef", "clip_coef", "Clip range of the probability ratio."),
    ("vf_coef", "vf_coef", "Weight of the value loss, 0.5 x MSE there too."),
    ("ent_coef", "ent_coef", "Weight of the entropy bonus."),
    ("max_grad_norm", "max_grad_norm", "Maximum norm of the gradient."),
)


PROFILE = Profile(
    program="CleanRL 1.0",
    source="cleanrl/ppo.py; images: ppo_atari.py, Box actions: ppo_continuous_action.py",
    keywords=(
        *(same(name, _CLEANRL_PPO[setting], text, setting) for name, setting, text in _NAMES),
        Keyword(
            "clip_vloss", True, "Clip the value loss by clip_coef.", lambda v: {"value_clip": "max" if v else "off"}
        ),
        Keyword(
            "norm_adv",
            True,
            "Normalise advantages per minibatch.",
            lambda v: {"normalize_advantages": "minibatch" if v else "off"},
        ),
        same("target_kl", None, "Stop an update after the epoch whose KL exceeds this."),
    ),
    facts=(
        fact(
            "wrappers",
            "by script",
            "NormalizeObservation and NormalizeReward for Box actions, ClipRewardEnv for Atari.",
            normalize_obs=False,
            normalize_rewards=False,
            sign_rewards=False,
        ),
        fact("KL check", "per epoch", "Of the last minibatch there, of the mean here.", kl_stop="epoch"),
        fact("target_kl factor", 1.0, "The KL is compared with target_kl itself.", kl_stop_factor=1.0),
        fact("eps", 1e-5, "Adam's epsilon.", adam_eps=1e-5),
        fact("anneal clip", False, "The clip range stays constant.", anneal_clip=False),
        fact("network", "64 64 tanh", "Separate networks for policy and value.", **NETWORK),
    ),
    facts_source="cleanrl/ppo.py, ppo_atari.py and ppo_continuous_action.py",
    differs=(TIME_LIMIT,),
)
