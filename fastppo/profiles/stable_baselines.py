"""The profiles of stable-baselines, on TensorFlow: PPO1 and PPO2."""

from __future__ import annotations

from typing import Any

from fastppo.profiles.profile import (
    NETWORK,
    NO_LIMIT,
    NO_NORMALISATION,
    RUN,
    TIME_LIMIT,
    Keyword,
    Profile,
    clip_range,
    fact,
    learning_rate,
    same,
)

_PROGRAM = "stable-baselines 2.10 (TensorFlow)"
_TENSORFLOW_RUN = (
    Keyword("verbose", 0, "Output on the terminal; fastppo shows its progress where the output is one."),
    Keyword("tensorboard_log", None, "Folder of TensorBoard's files; here run_dir, which always has them."),
    Keyword("_init_setup_model", True, "Build the network in the constructor; fastppo always does."),
    Keyword(
        "policy_kwargs", None, "Arguments of the policy; here hidden_sizes, activation, shared_trunk, memory_size."
    ),
    Keyword("full_tensorboard_log", False, "Also write histograms.", lambda value: {"log_histograms": value}),
    Keyword("seed", None, "Seed of every random draw; here 1 by default, there another one in every run."),
)


def _ppo1_schedule(value: Any) -> dict[str, Any]:  # noqa: ANN401 - text
    return {"anneal_lr": value == "linear", "anneal_clip": value == "linear"}


def _ppo2_value_clip(value: Any) -> dict[str, Any]:  # noqa: ANN401 - number, function or None
    if isinstance(value, (int, float)) and value < 0:
        return {"value_clip": "off", "value_clip_coef": None}
    return {"value_clip": "max", "value_clip_coef": value}


PPO1 = Profile(
    program=f"{_PROGRAM}, PPO1",
    source="stable_baselines/ppo1/pposgd_simple.py",
    keywords=(
        *RUN,
        same("gamma", 0.99, "Discount factor."),
        same("timesteps_per_actorbatch", 256, "Steps of each actor between two updates.", "n_steps"),
        same("clip_param", 0.2, "Clip range of the probability ratio; `schedule` anneals it too.", "clip_coef"),
        same("entcoeff", 0.01, "Weight of the entropy bonus; a larger one explores more.", "ent_coef"),
        same("optim_epochs", 4, "Passes over each rollout.", "update_epochs"),
        same("optim_stepsize", 1e-3, "Adam's step size at the start; `schedule` anneals it.", "learning_rate"),
        same("optim_batchsize", 64, "Rows of a minibatch: n_minibatches = steps / 64.", "minibatch_size"),
        same("lam", 0.95, "Lambda of GAE.", "gae_lambda"),
        same("adam_epsilon", 1e-5, "Adam's epsilon.", "adam_eps"),
        Keyword(
            "schedule",
            "linear",
            "linear: learning rate and clip range fall to 0 over the run; constant: both stay.",
            _ppo1_schedule,
        ),
        *_TENSORFLOW_RUN,
        Keyword("n_cpu_tf_sess", 1, "Threads of TensorFlow; here threads, those of torch."),
    ),
    facts=(
        fact("value loss", "MSE", "Weight 1 of MSE: 2 here, where the loss is 0.5 x MSE.", vf_coef=2.0),
        fact("value clipping", "none", "The value loss is not clipped.", value_clip="off", value_clip_coef=None),
        fact("gradient norm", "no limit", "The gradient is not clipped.", max_grad_norm=NO_LIMIT),
        fact(
            "advantages",
            "per rollout",
            "Advantages are normalised once, over the actor's rollout.",
            normalize_advantages="batch",
        ),
        fact("KL", "no limit", "No KL stops an update.", target_kl=None),
        fact("network", "64 64 tanh", "Separate networks for policy and value; the CNN is shared.", **NETWORK),
        fact("env", "one", "One environment in each MPI process.", n_envs=1),
        NO_NORMALISATION,
    ),
    facts_source="stable_baselines/ppo1/pposgd_simple.py, after openai/baselines baselines/ppo1/pposgd_simple.py",
    differs=(TIME_LIMIT, "MPI's processes: torchrun starts several of fastppo."),
)

PPO2 = Profile(
    program=f"{_PROGRAM}, PPO2",
    source="stable_baselines/ppo2/ppo2.py",
    keywords=(
        *RUN,
        same("gamma", 0.99, "Discount factor."),
        same("n_steps", 128, "Steps per environment and rollout; a batch is n_steps x n_envs rows."),
        same("ent_coef", 0.01, "Weight of the entropy bonus; a larger one explores more."),
        Keyword(
            "learning_rate",
            2.5e-4,
            "Adam's step size, constant; a function of the remaining progress there, a schedule here.",
            learning_rate,
        ),
        same("vf_coef", 0.5, "Weight of the value loss, 0.5 x MSE there too."),
        same("max_grad_norm", 0.5, "Maximum norm of the gradient, over all parameters."),
        same("lam", 0.95, "Lambda of GAE.", "gae_lambda"),
        same("nminibatches", 4, "Minibatches per epoch; a minibatch is n_batch / nminibatches rows.", "n_minibatches"),
        same("noptepochs", 4, "Passes over each rollout.", "update_epochs"),
        Keyword("cliprange", 0.2, "Clip range of the probability ratio, constant.", clip_range),
        Keyword(
            "cliprange_vf",
            None,
            "Clip range of the value loss. None: cliprange; negative: no clipping; else in units of the return.",
            _ppo2_value_clip,
        ),
        *_TENSORFLOW_RUN,
        Keyword("n_cpu_tf_sess", None, "Threads of TensorFlow; here threads, those of torch."),
    ),
    facts=(
        fact(
            "advantages",
            "per minibatch",
            "Advantages are normalised in each minibatch.",
            normalize_advantages="minibatch",
        ),
        fact("epsilon", 1e-5, "Adam's epsilon.", adam_eps=1e-5),
        fact("KL", "no limit", "No KL stops an update.", target_kl=None),
        fact("network", "64 64 tanh", "Separate networks for policy and value; the CNN is shared.", **NETWORK),
        fact("env", "four", "As many environments as the given VecEnv has; 4 in its documentation.", n_envs=4),
        NO_NORMALISATION,
    ),
    facts_source="stable_baselines/ppo2/ppo2.py, after openai/baselines baselines/ppo2/model.py",
    differs=(TIME_LIMIT,),
)
