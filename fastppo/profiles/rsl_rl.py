"""The profile of rsl_rl."""

from __future__ import annotations

from fastppo.profiles.profile import NETWORK, Keyword, Profile, clip_range, doubled, fact, same

PROFILE = Profile(
    program="rsl_rl 5, PPO",
    source="rsl_rl/algorithms/ppo.py of leggedrobotics/rsl_rl at 010cd22",
    keywords=(
        Keyword("actor, critic", "required", "Networks; here hidden_sizes and activation."),
        same("num_learning_epochs", 5, "Passes over each rollout.", "update_epochs"),
        same("num_mini_batches", 4, "Minibatches per epoch.", "n_minibatches"),
        Keyword("clip_param", 0.2, "Clip range of the probability ratio, and of the value.", clip_range),
        same("gamma", 0.99, "Discount factor."),
        same("lam", 0.95, "Lambda of GAE.", "gae_lambda"),
        Keyword(
            "value_loss_coef",
            1.0,
            "Weight of MSE; twice as large here, where the value loss is 0.5 x MSE.",
            lambda v: {"vf_coef": doubled(v)},
        ),
        same("entropy_coef", 0.01, "Weight of the entropy bonus.", "ent_coef"),
        Keyword(
            "learning_rate, schedule",
            "0.001 adaptive",
            "First learning rate; it follows the KL within 1e-5 and 1e-2.",
            lambda _: {"learning_rate": "adaptive:1e-3:1e-5:1e-2", "anneal_lr": False},
        ),
        same("max_grad_norm", 1.0, "Maximum norm of the gradient; of actor and critic separately there."),
        Keyword("optimizer", "adam", "Optimiser."),
        Keyword(
            "use_clipped_value_loss",
            True,
            "Take the larger of clipped and unclipped value loss.",
            lambda v: {"value_clip": "max" if v else "off", "value_clip_coef": None},
        ),
        same("desired_kl", 0.01, "Target of the adaptive learning rate.", "adaptive_kl"),
        Keyword(
            "normalize_advantage_per_mini_batch",
            False,
            "False: advantages are normalised once, over the rollout.",
            lambda v: {"normalize_advantages": "minibatch" if v else "batch"},
        ),
    ),
    facts=(
        fact("eps", 1e-8, "Adam's epsilon, torch's default.", adam_eps=1e-8),
        fact("KL", "no limit", "No KL stops an update.", target_kl=None),
        fact(
            "hidden_dims, activation",
            "256 256 256 elu",
            "Separate networks for policy and value.",
            **NETWORK | {"hidden_sizes": (256, 256, 256), "activation": "elu"},
        ),
        fact("num_steps_per_env", 24, "Steps per environment and rollout, of its example configurations.", n_steps=24),
        fact("env", 4096, "Environments of its simulators' configurations.", n_envs=4096),
        fact(
            "obs_normalization",
            False,
            "Observations and rewards are used as the environment gives them.",
            normalize_obs=False,
            normalize_rewards=False,
        ),
    ),
    facts_source="rsl_rl/models/mlp_model.py and algorithms/ppo.py; sizes: legged_gym's configurations",
    differs=(
        "At a time limit it adds V of the observation before the last step; fastppo that of the last one.",
        "Its networks start from torch's initial weights, fastppo's from orthogonal ones.",
    ),
)
