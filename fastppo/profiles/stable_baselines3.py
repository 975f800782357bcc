"""The profile of stable-baselines3."""

from __future__ import annotations

from typing import Any

from fastppo.profiles.profile import (
    NETWORK,
    NO_NORMALISATION,
    RUN,
    Keyword,
    Profile,
    clip_range,
    doubled,
    fact,
    learning_rate,
    same,
)


def _sb3_value_clip(value: Any) -> dict[str, Any]:  # noqa: ANN401 - number, function or None
    return {"value_clip": "off" if value is None else "clipped_only", "value_clip_coef": value}


PPO = Profile(
    program="stable-baselines3 2.9.2, PPO",
    source="stable_baselines3/ppo/ppo.py",
    keywords=(
        *RUN,
        Keyword(
            "learning_rate",
            3e-4,
            "Adam's step size, constant; a function of the remaining progress there, a schedule here.",
            learning_rate,
        ),
        same("n_steps", 2048, "Steps per environment and rollout."),
        same("batch_size", 64, "Rows of a minibatch: n_minibatches = n_envs x n_steps / 64.", "minibatch_size"),
        same("n_epochs", 10, "Passes over each rollout.", "update_epochs"),
        same("gamma", 0.99, "Discount factor."),
        same("gae_lambda", 0.95, "Lambda of GAE."),
        Keyword("clip_range", 0.2, "Clip range of the probability ratio, constant.", clip_range),
        Keyword(
            "clip_range_vf",
            None,
            "None: no value clipping. A number: the loss of the clipped value alone.",
            _sb3_value_clip,
        ),
        Keyword(
            "normalize_advantage",
            True,
            "Normalise advantages per minibatch.",
            lambda v: {"normalize_advantages": "minibatch" if v else "off"},
        ),
        same("ent_coef", 0.0, "Weight of the entropy bonus."),
        Keyword(
            "vf_coef",
            0.5,
            "Weight of MSE; twice as large here, where the value loss is 0.5 x MSE.",
            lambda v: {"vf_coef": doubled(v)},
        ),
        same("max_grad_norm", 0.5, "Maximum norm of the gradient."),
        Keyword("use_sde", False, "Noise that depends on the state; fastppo has none."),
        Keyword("sde_sample_freq", -1, "Of use_sde."),
        Keyword("rollout_buffer_class", None, "Another storage; fastppo has one."),
        Keyword("rollout_buffer_kwargs", None, "Of rollout_buffer_class."),
        same("target_kl", None, "Stop an update before the minibatch whose KL exceeds 1.5 x target_kl."),
        Keyword("stats_window_size", 100, "Episodes of the mean return; 100 here too."),
        Keyword("tensorboard_log", None, "Folder of TensorBoard's files; here run_dir, which always has them."),
        Keyword("policy_kwargs", None, "Arguments of the policy; here hidden_sizes, activation and others."),
        Keyword("verbose", 0, "Output on the terminal; fastppo shows its progress where the output is one."),
        Keyword("seed", None, "Seed of every random draw; here 1 by default, there another one in every run."),
        Keyword("device", "auto", "Device to train on.", lambda v: {"device": str(v)}),
        Keyword("_init_setup_model", True, "Build the network in the constructor; fastppo always does."),
    ),
    facts=(
        fact("KL check", "minibatch", "The KL is checked in each minibatch, before its step.", kl_stop="minibatch"),
        fact("target_kl factor", 1.5, "An update stops at 1.5 x target_kl.", kl_stop_factor=1.5),
        fact("optimizer eps", 1e-5, "Adam's epsilon.", adam_eps=1e-5),
        fact("net_arch", "64 64 tanh", "Separate networks for policy and value; the CNN is shared.", **NETWORK),
        fact("env", "one", "An environment that is no VecEnv is one environment.", n_envs=1),
        NO_NORMALISATION,
    ),
    facts_source="stable_baselines3/ppo/ppo.py and common/policies.py",
    differs=("A last, shorter minibatch, where 64 doesn't divide the rollout; n_minibatches must divide it.",),
)
