"""Default settings: per kind of environment, per environment id, and those of other programs. Data only.

A profile lists the keywords of another program with their defaults, and what a value of each means in fastppo's
settings: where two programs mean different things by one name, the translation says so, not the code that trains.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

Kind = Literal["discrete", "image", "continuous"]
ProfileName = Literal["cleanrl", "tuned", "tuned_penalty", "sb3", "ppo1", "ppo2", "rsl_rl"]

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

NO_LIMIT = 1e9  # of the gradient's norm, for programs that don't clip it


@dataclasses.dataclass(frozen=True)
class Keyword:
    """A keyword of another program, or a fact of its code.

    Attributes:
        name: its name there.
        default: its value there.
        text: its meaning, and where that differs from the setting's.
        translate: a value there -> settings here; None: no setting of a run stands for it. `minibatch_size`, the rows
            of a minibatch, is no setting, but determines n_minibatches.
    """

    name: str
    default: Any
    text: str
    translate: Callable[[Any], dict[str, Any]] | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that stand for the default."""
        return {} if self.translate is None else self.translate(self.default)


@dataclasses.dataclass(frozen=True)
class Profile:
    """The defaults of another program, as settings.

    Attributes:
        program: name and version.
        source: file that holds the keywords and their defaults.
        keywords: the keywords of its constructor or script.
        facts: what its code does without a keyword for it.
        facts_source: file that holds the facts.
        differs: what no setting reproduces.
    """

    program: str
    source: str
    keywords: tuple[Keyword, ...]
    facts: tuple[Keyword, ...] = ()
    facts_source: str = ""
    differs: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """Every setting of the profile, and `minibatch_size` if it counts rows."""
        return {name: value for entry in (*self.facts, *self.keywords) for name, value in entry.settings.items()}

    def translate(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings for some of the program's keywords, over the profile's own.

        Raises:
            KeyError: there is no such keyword, or it stands for no setting.
        """
        settings = self.settings
        functions = {keyword.name: keyword.translate for keyword in self.keywords if keyword.translate is not None}
        for name, value in given.items():
            settings |= functions[name](value)
        return settings


def _same(name: str, default: Any, text: str, setting: str = "") -> Keyword:  # noqa: ANN401 - any value
    """Return a keyword that means what a setting does."""
    return Keyword(name, default, text, lambda value: {setting or name: value})


def _fact(name: str, value: Any, text: str, **settings: Any) -> Keyword:  # noqa: ANN401 - any value
    return Keyword(name, value, text, lambda _: settings)


def _doubled(value: Any) -> Any:  # noqa: ANN401 - a number; text is refused by the setting
    """Return the weight of a value loss 0.5 x MSE that equals this weight of a value loss MSE."""
    return 2 * value if isinstance(value, (int, float)) else value


def _learning_rate(value: Any) -> dict[str, Any]:  # noqa: ANN401 - number or function
    return {"learning_rate": value, "anneal_lr": False}


def _clip_range(value: Any) -> dict[str, Any]:  # noqa: ANN401 - number or function
    return {"clip_coef": value, "anneal_clip": False}


def _sb3_value_clip(value: Any) -> dict[str, Any]:  # noqa: ANN401 - number, function or None
    return {"value_clip": "off" if value is None else "clipped_only", "value_clip_coef": value}


def _ppo2_value_clip(value: Any) -> dict[str, Any]:  # noqa: ANN401 - number, function or None
    if isinstance(value, (int, float)) and value < 0:
        return {"value_clip": "off", "value_clip_coef": None}
    return {"value_clip": "max", "value_clip_coef": value}


def _ppo1_schedule(value: Any) -> dict[str, Any]:  # noqa: ANN401 - text
    return {"anneal_lr": value == "linear", "anneal_clip": value == "linear"}


_NETWORK: dict[str, Any] = {
    "hidden_sizes": (64, 64),
    "activation": "tanh",
    "shared_trunk": False,
    "action_distribution": "gaussian",
    "state_dependent_std": False,
    "memory": "none",
}
_NO_NORMALISATION = _fact(
    "normalisation",
    "none",
    "Observations and rewards are used as the environment gives them; VecNormalize is a wrapper of its own.",
    normalize_obs=False,
    normalize_rewards=False,
)
_TIME_LIMIT = "At a time limit it counts the episode as ended; fastppo adds V of the last observation."
_STABLE_BASELINES = "stable-baselines 2.10 (TensorFlow)"
_RUN = (
    Keyword("policy", "required", "Class or name of the policy; here network, hidden_sizes, activation and memory."),
    Keyword("env", "required", "Environment or its id; here env_id, or make_env in Python."),
)
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

_CLEANRL_NAMES = (
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

PROFILES: dict[ProfileName, Profile] = {
    "cleanrl": Profile(
        program="CleanRL 1.0",
        source="cleanrl/ppo.py; images: ppo_atari.py, Box actions: ppo_continuous_action.py",
        keywords=(
            *(_same(name, _CLEANRL_PPO[setting], text, setting) for name, setting, text in _CLEANRL_NAMES),
            Keyword(
                "clip_vloss", True, "Clip the value loss by clip_coef.", lambda v: {"value_clip": "max" if v else "off"}
            ),
            Keyword(
                "norm_adv",
                True,
                "Normalise advantages per minibatch.",
                lambda v: {"normalize_advantages": "minibatch" if v else "off"},
            ),
            _same("target_kl", None, "Stop an update after the epoch whose KL exceeds this."),
        ),
        facts=(
            _fact(
                "wrappers",
                "by script",
                "NormalizeObservation and NormalizeReward for Box actions, ClipRewardEnv for Atari.",
                normalize_obs=False,
                normalize_rewards=False,
                sign_rewards=False,
            ),
            _fact("KL check", "per epoch", "Of the last minibatch there, of the mean here.", kl_stop="epoch"),
            _fact("target_kl factor", 1.0, "The KL is compared with target_kl itself.", kl_stop_factor=1.0),
            _fact("eps", 1e-5, "Adam's epsilon.", adam_eps=1e-5),
            _fact("anneal clip", False, "The clip range stays constant.", anneal_clip=False),
            _fact("network", "64 64 tanh", "Separate networks for policy and value.", **_NETWORK),
        ),
        facts_source="cleanrl/ppo.py, ppo_atari.py and ppo_continuous_action.py",
        differs=(_TIME_LIMIT,),
    ),
    "sb3": Profile(
        program="stable-baselines3 2.9.2, PPO",
        source="stable_baselines3/ppo/ppo.py",
        keywords=(
            *_RUN,
            Keyword(
                "learning_rate",
                3e-4,
                "Adam's step size, constant; a function of the remaining progress there, a schedule here.",
                _learning_rate,
            ),
            _same("n_steps", 2048, "Steps per environment and rollout."),
            _same("batch_size", 64, "Rows of a minibatch: n_minibatches = n_envs x n_steps / 64.", "minibatch_size"),
            _same("n_epochs", 10, "Passes over each rollout.", "update_epochs"),
            _same("gamma", 0.99, "Discount factor."),
            _same("gae_lambda", 0.95, "Lambda of GAE."),
            Keyword("clip_range", 0.2, "Clip range of the probability ratio, constant.", _clip_range),
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
            _same("ent_coef", 0.0, "Weight of the entropy bonus."),
            Keyword(
                "vf_coef",
                0.5,
                "Weight of MSE; twice as large here, where the value loss is 0.5 x MSE.",
                lambda v: {"vf_coef": _doubled(v)},
            ),
            _same("max_grad_norm", 0.5, "Maximum norm of the gradient."),
            Keyword("use_sde", False, "Noise that depends on the state; fastppo has none."),
            Keyword("sde_sample_freq", -1, "Of use_sde."),
            Keyword("rollout_buffer_class", None, "Another storage; fastppo has one."),
            Keyword("rollout_buffer_kwargs", None, "Of rollout_buffer_class."),
            _same("target_kl", None, "Stop an update before the minibatch whose KL exceeds 1.5 x target_kl."),
            Keyword("stats_window_size", 100, "Episodes of the mean return; 100 here too."),
            Keyword("tensorboard_log", None, "Folder of TensorBoard's files; here run_dir, which always has them."),
            Keyword("policy_kwargs", None, "Arguments of the policy; here hidden_sizes, activation and others."),
            Keyword("verbose", 0, "Output on the terminal; fastppo shows its progress where the output is one."),
            Keyword("seed", None, "Seed of every random draw; here 1 by default, there another one in every run."),
            Keyword("device", "auto", "Device to train on.", lambda v: {"device": str(v)}),
            Keyword("_init_setup_model", True, "Build the network in the constructor; fastppo always does."),
        ),
        facts=(
            _fact(
                "KL check", "minibatch", "The KL is checked in each minibatch, before its step.", kl_stop="minibatch"
            ),
            _fact("target_kl factor", 1.5, "An update stops at 1.5 x target_kl.", kl_stop_factor=1.5),
            _fact("optimizer eps", 1e-5, "Adam's epsilon.", adam_eps=1e-5),
            _fact("net_arch", "64 64 tanh", "Separate networks for policy and value; the CNN is shared.", **_NETWORK),
            _fact("env", "one", "An environment that is no VecEnv is one environment.", n_envs=1),
            _NO_NORMALISATION,
        ),
        facts_source="stable_baselines3/ppo/ppo.py and common/policies.py",
        differs=("A last, shorter minibatch, where 64 doesn't divide the rollout; n_minibatches must divide it.",),
    ),
    "ppo1": Profile(
        program=f"{_STABLE_BASELINES}, PPO1",
        source="stable_baselines/ppo1/pposgd_simple.py",
        keywords=(
            *_RUN,
            _same("gamma", 0.99, "Discount factor."),
            _same("timesteps_per_actorbatch", 256, "Steps of each actor between two updates.", "n_steps"),
            _same("clip_param", 0.2, "Clip range of the probability ratio; `schedule` anneals it too.", "clip_coef"),
            _same("entcoeff", 0.01, "Weight of the entropy bonus; a larger one explores more.", "ent_coef"),
            _same("optim_epochs", 4, "Passes over each rollout.", "update_epochs"),
            _same("optim_stepsize", 1e-3, "Adam's step size at the start; `schedule` anneals it.", "learning_rate"),
            _same("optim_batchsize", 64, "Rows of a minibatch: n_minibatches = steps / 64.", "minibatch_size"),
            _same("lam", 0.95, "Lambda of GAE.", "gae_lambda"),
            _same("adam_epsilon", 1e-5, "Adam's epsilon.", "adam_eps"),
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
            _fact("value loss", "MSE", "Weight 1 of MSE: 2 here, where the loss is 0.5 x MSE.", vf_coef=2.0),
            _fact("value clipping", "none", "The value loss is not clipped.", value_clip="off", value_clip_coef=None),
            _fact("gradient norm", "no limit", "The gradient is not clipped.", max_grad_norm=NO_LIMIT),
            _fact(
                "advantages",
                "per rollout",
                "Advantages are normalised once, over the actor's rollout.",
                normalize_advantages="batch",
            ),
            _fact("KL", "no limit", "No KL stops an update.", target_kl=None),
            _fact("network", "64 64 tanh", "Separate networks for policy and value; the CNN is shared.", **_NETWORK),
            _fact("env", "one", "One environment in each MPI process.", n_envs=1),
            _NO_NORMALISATION,
        ),
        facts_source="stable_baselines/ppo1/pposgd_simple.py, after openai/baselines baselines/ppo1/pposgd_simple.py",
        differs=(_TIME_LIMIT, "MPI's processes: torchrun starts several of fastppo."),
    ),
    "ppo2": Profile(
        program=f"{_STABLE_BASELINES}, PPO2",
        source="stable_baselines/ppo2/ppo2.py",
        keywords=(
            *_RUN,
            _same("gamma", 0.99, "Discount factor."),
            _same("n_steps", 128, "Steps per environment and rollout; a batch is n_steps x n_envs rows."),
            _same("ent_coef", 0.01, "Weight of the entropy bonus; a larger one explores more."),
            Keyword(
                "learning_rate",
                2.5e-4,
                "Adam's step size, constant; a function of the remaining progress there, a schedule here.",
                _learning_rate,
            ),
            _same("vf_coef", 0.5, "Weight of the value loss, 0.5 x MSE there too."),
            _same("max_grad_norm", 0.5, "Maximum norm of the gradient, over all parameters."),
            _same("lam", 0.95, "Lambda of GAE.", "gae_lambda"),
            _same(
                "nminibatches", 4, "Minibatches per epoch; a minibatch is n_batch / nminibatches rows.", "n_minibatches"
            ),
            _same("noptepochs", 4, "Passes over each rollout.", "update_epochs"),
            Keyword("cliprange", 0.2, "Clip range of the probability ratio, constant.", _clip_range),
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
            _fact(
                "advantages",
                "per minibatch",
                "Advantages are normalised in each minibatch.",
                normalize_advantages="minibatch",
            ),
            _fact("epsilon", 1e-5, "Adam's epsilon.", adam_eps=1e-5),
            _fact("KL", "no limit", "No KL stops an update.", target_kl=None),
            _fact("network", "64 64 tanh", "Separate networks for policy and value; the CNN is shared.", **_NETWORK),
            _fact("env", "four", "As many environments as the given VecEnv has; 4 in its documentation.", n_envs=4),
            _NO_NORMALISATION,
        ),
        facts_source="stable_baselines/ppo2/ppo2.py, after openai/baselines baselines/ppo2/model.py",
        differs=(_TIME_LIMIT,),
    ),
    "rsl_rl": Profile(
        program="rsl_rl 5, PPO",
        source="rsl_rl/algorithms/ppo.py of leggedrobotics/rsl_rl at 010cd22",
        keywords=(
            Keyword("actor, critic", "required", "Networks; here hidden_sizes and activation."),
            _same("num_learning_epochs", 5, "Passes over each rollout.", "update_epochs"),
            _same("num_mini_batches", 4, "Minibatches per epoch.", "n_minibatches"),
            Keyword("clip_param", 0.2, "Clip range of the probability ratio, and of the value.", _clip_range),
            _same("gamma", 0.99, "Discount factor."),
            _same("lam", 0.95, "Lambda of GAE.", "gae_lambda"),
            Keyword(
                "value_loss_coef",
                1.0,
                "Weight of MSE; twice as large here, where the value loss is 0.5 x MSE.",
                lambda v: {"vf_coef": _doubled(v)},
            ),
            _same("entropy_coef", 0.01, "Weight of the entropy bonus.", "ent_coef"),
            Keyword(
                "learning_rate, schedule",
                "0.001 adaptive",
                "First learning rate; it follows the KL within 1e-5 and 1e-2.",
                lambda _: {"learning_rate": "adaptive:1e-3:1e-5:1e-2", "anneal_lr": False},
            ),
            _same("max_grad_norm", 1.0, "Maximum norm of the gradient; of actor and critic separately there."),
            Keyword("optimizer", "adam", "Optimiser."),
            Keyword(
                "use_clipped_value_loss",
                True,
                "Take the larger of clipped and unclipped value loss.",
                lambda v: {"value_clip": "max" if v else "off", "value_clip_coef": None},
            ),
            _same("desired_kl", 0.01, "Target of the adaptive learning rate.", "adaptive_kl"),
            Keyword(
                "normalize_advantage_per_mini_batch",
                False,
                "False: advantages are normalised once, over the rollout.",
                lambda v: {"normalize_advantages": "minibatch" if v else "batch"},
            ),
        ),
        facts=(
            _fact("eps", 1e-8, "Adam's epsilon, torch's default.", adam_eps=1e-8),
            _fact("KL", "no limit", "No KL stops an update.", target_kl=None),
            _fact(
                "hidden_dims, activation",
                "256 256 256 elu",
                "Separate networks for policy and value.",
                **_NETWORK | {"hidden_sizes": (256, 256, 256), "activation": "elu"},
            ),
            _fact(
                "num_steps_per_env", 24, "Steps per environment and rollout, of its example configurations.", n_steps=24
            ),
            _fact("env", 4096, "Environments of its simulators' configurations.", n_envs=4096),
            _fact(
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
    ),
}


def profile_settings(name: object) -> dict[str, Any]:
    """Return the settings of a profile that don't depend on the environment; none for a name that is no profile."""
    if not isinstance(name, str):  # refused later, with the setting's name
        return {}
    others: dict[str, dict[str, Any]] = {key: profile.settings for key, profile in PROFILES.items()}
    return (others | {key: profile.always for key, profile in MEASURED.items()}).get(name, {})
