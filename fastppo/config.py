"""Every setting of a run: one flat, frozen dataclass whose fields are the command line's flags.

Each field of `Config` carries its metadata (`Setting`): section, range, unit, and effect on a run. Range checks,
schedules, the settings a resume must keep, the grouping of seeds in reports, `--help` and docs/settings.md are derived
from it.

A field that is None is not given: `fill_defaults` fills it by the kind of environment (CleanRL's `ppo.py` for vectors
and discrete actions, `ppo_atari.py` for images, `ppo_continuous_action.py` for Box actions) or from a profile. Filling
a filled config changes nothing, so a run folder stores exactly the settings that ran. A profile's other settings are
set by the constructor, under those that are given. Layers 0 to 4 (docs/architecture.md) take plain values, no Config.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import numbers
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fastppo.errors import ConfigError
from fastppo.profiles import CLEANRL, MEASURED, PROFILES, TUNED, Kind, ProfileName

Section = Literal[
    "environment",
    "run",
    "rollout",
    "optimisation",
    "exploration",
    "policy",
    "normalisation",
    "device and speed",
    "checkpointing",
    "evaluation",
    "logging",
]
Changes = Literal["results", "noise", "nothing"]
OnResume = Literal["keep", "note", "free"]


@dataclasses.dataclass(frozen=True)
class SearchValues:
    """Values of a setting that `fastppo tune` tries: some choices, or a range.

    Attributes:
        choices: the values; empty: a range.
        low: smallest value of a range.
        high: largest value of a range.
        log: draw its logarithm uniformly, not the value itself.
    """

    choices: tuple[float | bool, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Metadata of a field of `Config`. Type and default are the field's own; its docstring is the help text.

    Attributes:
        section: heading in `--help` and docs/settings.md.
        at_least: smallest valid number. A range holds for each number of a schedule or a list.
        above: exclusive lower bound.
        at_most: largest valid number.
        unit: placeholder of the value in `--help`; None: by the field's type.
        unset: meaning of None, in words; None: filled by the kind of environment.
        alias: another name, on the command line and in files.
        scheduled: a schedule over the run may be given instead of a number.
        changes: what a run computes differently under another value. "results": what it learns. "noise": only random
            draws or rounding, so that runs that differ in nothing else are samples of one experiment. "nothing": no
            number of any iteration.
        on_resume: another value in a resumed run, if the setting changes numbers. "keep": refused, because it defines
            the task, the network or its inputs. "note": takes effect from there on, with a note, but not under
            exact_resume. "free": takes effect without a note; it changes the end of the run, not its course.
        chosen_at_start: "auto" or None is replaced at the start, by measuring or by inspecting machine and environment.
        search: values that `fastppo tune` tries where none is given; None: it leaves the setting alone.
    """

    section: Section
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    unit: str | None = None
    unset: str | None = None
    alias: str | None = None
    scheduled: bool = False
    changes: Changes = "results"
    on_resume: OnResume = "note"
    chosen_at_start: bool = False
    search: SearchValues | None = None

    @property
    def fixed(self) -> bool:
        """Whether a resumed run must keep the value."""
        return self.changes != "nothing" and self.on_resume == "keep"


def _json(text: str) -> Any:  # noqa: ANN401 - any JSON value; `_check_types` checks it
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _number_or_text(text: str) -> Any:  # noqa: ANN401 - as `_json`
    try:
        return float(text)
    except ValueError:
        return text


EnvKwargs = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda args: _json(args[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]
TargetReturn = Annotated[
    float | Literal["threshold"] | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER|threshold",
        instance_from_str=lambda args: _number_or_text(args[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one run. `fill_defaults` fills the fields that are None.

    Coefficients take a number or a schedule over the planned iterations: `linear:2.5e-4:0`, `cosine:2.5e-4:1e-5`.

    Raises:
        ConfigError: a value of the wrong type or outside its range, or settings that contradict each other.
    """

    env_id: Annotated[str, Setting(section="environment", unit="ID", on_resume="keep")] = "CartPole-v1"
    """Gymnasium environment id, also `ALE/...` and `module:Env-v0`."""
    env_kwargs: Annotated[EnvKwargs, Setting(section="environment", unit="JSON", on_resume="keep")] = dataclasses.field(
        default_factory=dict
    )
    """Keyword arguments of the environment, as a JSON object."""
    wrappers: Annotated[
        tuple[str, ...], Setting(section="environment", unit="MODULE:NAME [...]", on_resume="keep")
    ] = ()
    """Wrappers of each environment, the innermost first, such as `gymnasium.wrappers:FlattenObservation`: classes or
    functions that take an environment and return one."""
    obs_keys: Annotated[tuple[str, ...], Setting(section="environment", unit="KEY [...]", on_resume="keep")] = ()
    """Keys of a Dict (or indices of a Tuple) observation to read, such as `image direction` or `camera/left`; by
    default all."""
    critic_obs_keys: Annotated[tuple[str, ...], Setting(section="environment", unit="KEY [...]", on_resume="keep")] = ()
    """Keys that only the critic reads: what a simulator knows and the policy must do without."""
    action_masks: Annotated[Literal["auto", "off"], Setting(section="environment", on_resume="keep")] = "auto"
    """`auto`: choose among allowed actions only, if the environment says which these are: by a Dict key `action_mask`,
    a method `action_masks()`, or `info["action_mask"]`."""
    vectorization: Annotated[
        Literal["auto", "sync", "async", "pool", "native", "envpool", "tensor"],
        Setting(section="environment", changes="noise", chosen_at_start=True),
    ] = "sync"
    """How environments are stepped. `sync`: in this process; `async`: one process each; `pool`: several per worker
    process; `native`: the environment's own vector version; `envpool`: EnvPool's; `tensor`: fastppo's, in torch on the
    training device (CartPole, Acrobot, Pendulum, MountainCarContinuous, fastppo/Catch); `auto`: the fastest of sync,
    pool and native, measured at the start."""
    workers: Annotated[
        int | None,
        Setting(section="environment", at_least=1, at_most=1024, unset="one per core", changes="nothing"),
    ] = None
    """Worker processes of the pool."""
    half_batches: Annotated[bool, Setting(section="environment", changes="noise")] = False
    """Step the pool in two halves: the policy acts on one half while workers step the other."""
    on_env_error: Annotated[Literal["fail", "restart"], Setting(section="environment", changes="nothing")] = "fail"
    """When an environment raises, or a pool worker dies or hangs: end the run, or restart the environment and cut its
    episode (sync and pool)."""
    env_restarts: Annotated[int, Setting(section="environment", at_least=1, changes="nothing")] = 10
    """Maximum environment restarts per run."""
    env_timeout: Annotated[
        float | None, Setting(section="environment", above=0, unit="SECONDS", unset="none", changes="nothing")
    ] = None
    """Maximum seconds for a step or reset of one pool worker's environments, or of all async ones."""
    rescale_actions: Annotated[bool, Setting(section="environment")] = False
    """Let the policy act in [-1, 1] and map that to the bounds of the Box action space, as Gymnasium's RescaleAction
    does; for bounds far from +-1."""
    strict_obs: Annotated[bool, Setting(section="environment", changes="nothing")] = False
    """End the run when an observation is outside its observation_space, instead of warning once."""

    seed: Annotated[int, Setting(section="run", at_least=0, at_most=2**63 - 1, changes="noise", on_resume="keep")] = 1
    """Seed of environments, initial weights, action noise and minibatch order."""
    total_timesteps: Annotated[
        int | None, Setting(section="run", at_least=1, at_most=10**15, unit="STEPS", on_resume="free")
    ] = None
    """Environment steps to train for, over all environments; rounded down to whole iterations."""
    target_return: Annotated[
        TargetReturn, Setting(section="run", unit="NUMBER|threshold", unset="none", on_resume="free")
    ] = None
    """Stop once the mean return of the last 100 episodes reaches this; `threshold`: the environment's reward_threshold,
    if it has one."""
    profile: Annotated[ProfileName, Setting(section="run", alias="preset", changes="nothing")] = "cleanrl"
    """Defaults of the other settings. `cleanrl`: CleanRL's for this kind of environment; `tuned`, `tuned_penalty`:
    measured for this environment id, where available; `sb3`, `ppo1`, `ppo2`, `rsl_rl`: those of stable-baselines3, of
    PPO1 and PPO2 in stable-baselines, of rsl_rl. `fastppo profile NAME` prints them."""
    init_from: Annotated[Path | None, Setting(section="run", unset="none", on_resume="free")] = None
    """Start from the policy and normalisers of this run folder."""
    name: Annotated[str, Setting(section="run", changes="nothing")] = "ppo"
    """Name of the run; its folder is runs/<env>/<name>-<seed>-<time>/."""
    run_dir: Annotated[Path | None, Setting(section="run", unset="runs/...", changes="nothing")] = None
    """Run folder, which must be new or empty."""

    n_envs: Annotated[int | None, Setting(section="rollout", at_least=1, alias="num_envs")] = None
    """Environments stepped together (N)."""
    n_steps: Annotated[
        int | None,
        Setting(
            section="rollout",
            at_least=1,
            unit="STEPS",
            alias="num_steps",
            search=SearchValues((32, 64, 128, 256, 512, 1024, 2048)),
        ),
    ] = None
    """Steps per environment and rollout (T); an iteration is n_envs x n_steps steps."""
    gamma: Annotated[
        float | str | None,
        Setting(
            section="rollout",
            at_least=0,
            at_most=1,
            scheduled=True,
            search=SearchValues((0.9, 0.95, 0.98, 0.99, 0.995, 0.999)),
        ),
    ] = None
    """Discount factor."""
    gae_lambda: Annotated[
        float | str | None,
        Setting(
            section="rollout", at_least=0, at_most=1, scheduled=True, search=SearchValues((0.8, 0.9, 0.95, 0.98, 1.0))
        ),
    ] = None
    """Lambda of generalised advantage estimation (GAE)."""

    n_minibatches: Annotated[
        int | None,
        Setting(section="optimisation", at_least=1, alias="num_minibatches", search=SearchValues((1, 2, 4, 8, 16, 32))),
    ] = None
    """Minibatches per epoch; must divide n_envs x n_steps. With memory, the default is lowered until it divides the
    sequences of a rollout."""
    segment_length: Annotated[
        int | None, Setting(section="optimisation", at_least=1, unit="STEPS", unset="n_steps")
    ] = None
    """Steps per training sequence of a policy with memory; must divide n_steps. Gradients flow no further back. A
    minibatch holds whole sequences, so n_minibatches must divide n_envs x n_steps / segment_length."""
    update_epochs: Annotated[
        int | None, Setting(section="optimisation", at_least=1, search=SearchValues((1, 3, 5, 10, 20)))
    ] = None
    """Passes over each rollout, each in a new random order."""
    learning_rate: Annotated[
        float | str | None,
        Setting(section="optimisation", at_least=0, scheduled=True, search=SearchValues(low=1e-5, high=1e-2, log=True)),
    ] = None
    """Step size of the optimiser. Like every NUMBER|SCHEDULE: a number, linear:START:END, cosine:START:END or
    constant:VALUE; also adaptive:START:LOWEST:HIGHEST, which follows the KL of each minibatch (`--adaptive-kl`)."""
    adaptive_kl: Annotated[float, Setting(section="optimisation", above=0)] = 0.01
    """Target of an adaptive learning rate: above twice this exact KL the rate is divided by 1.5, below half of it
    multiplied by 1.5."""
    anneal_lr: Annotated[bool | None, Setting(section="optimisation", search=SearchValues((True, False)))] = None
    """Anneal the learning rate to 0: short for `--learning-rate linear:X:0`."""
    optimizer: Annotated[Literal["adam", "muon"], Setting(section="optimisation", on_resume="keep")] = "adam"
    """`muon`: Muon for the matrices of hidden layers, with steps of Adam's size, and Adam for all other parameters."""
    adam_eps: Annotated[float, Setting(section="optimisation", above=0)] = 1e-5
    """Adam's epsilon."""
    objective: Annotated[Literal["clip", "penalty", "clip_and_penalty"], Setting(section="optimisation")] = "clip"
    """Objective of the policy. `clip`: the clipped surrogate; `penalty`: the unclipped one with a penalty on the exact
    KL, whose weight adapts; `clip_and_penalty`: the clipped one with that penalty."""
    kl_coef: Annotated[
        float,
        Setting(
            section="optimisation",
            at_least=1e-4,
            at_most=1e4,
            on_resume="keep",
            search=SearchValues(low=0.3, high=3.0, log=True),
        ),
    ] = 1.0
    """First weight of the KL penalty; after each update it is halved or doubled towards penalty_kl, within 1e-4 and
    1e4."""
    penalty_kl: Annotated[
        float, Setting(section="optimisation", above=0, search=SearchValues(low=0.003, high=0.03, log=True))
    ] = 0.01
    """Target of the penalty: the weight is halved below penalty_kl / 1.5, doubled above penalty_kl x 1.5. Not a limit,
    unlike target_kl."""
    clip_coef: Annotated[
        float | str | None,
        Setting(section="optimisation", at_least=0, scheduled=True, search=SearchValues((0.1, 0.2, 0.3, 0.4))),
    ] = None
    """Clip range of the probability ratio."""
    anneal_clip: Annotated[bool | None, Setting(section="optimisation")] = None
    """Anneal the clip range to 0: short for `--clip-coef linear:X:0`."""
    value_clip: Annotated[Literal["off", "max", "clipped_only"] | None, Setting(section="optimisation")] = None
    """Clipping of the value loss. `max`: the larger of clipped and unclipped loss; `clipped_only`: the clipped loss, as
    in stable-baselines3."""
    value_clip_coef: Annotated[
        float | str | None, Setting(section="optimisation", unset="clip_coef", scheduled=True)
    ] = None
    """Clip range of the value loss, in units of the return; a negative number switches clipping off."""
    vf_coef: Annotated[
        float | str | None,
        Setting(section="optimisation", at_least=0, scheduled=True, search=SearchValues(low=0.2, high=2.0)),
    ] = None
    """Weight of the value loss, 0.5 x mean squared error."""
    ent_coef: Annotated[
        float | str | None,
        Setting(section="optimisation", at_least=0, scheduled=True, search=SearchValues(low=1e-8, high=0.1, log=True)),
    ] = None
    """Weight of the entropy bonus."""
    max_grad_norm: Annotated[
        float | str | None,
        Setting(section="optimisation", above=0, scheduled=True, search=SearchValues((0.3, 0.5, 1.0, 2.0, 5.0))),
    ] = None
    """Maximum global L2 norm of the gradient."""
    normalize_advantages: Annotated[Literal["minibatch", "batch", "off"], Setting(section="optimisation")] = "minibatch"
    """Normalise advantages to mean 0 and standard deviation 1, per minibatch or once per rollout."""
    target_kl: Annotated[float | str | None, Setting(section="optimisation", above=0, unset="none", scheduled=True)] = (
        None
    )
    """Stop an update early once its approximate KL (k3) exceeds target_kl x kl_stop_factor."""
    kl_stop: Annotated[Literal["epoch", "minibatch"], Setting(section="optimisation")] = "epoch"
    """Check the KL after each epoch, by its mean, or in each minibatch before its step."""
    kl_stop_factor: Annotated[float, Setting(section="optimisation", above=0)] = 1.0
    """Factor on target_kl; stable-baselines3 uses 1.5."""
    max_skipped: Annotated[int, Setting(section="optimisation", at_least=1, changes="nothing")] = 20
    """End the run after this many consecutive minibatches with a NaN or infinite gradient, and keep the inputs for
    `fastppo replay`."""

    rnd: Annotated[bool, Setting(section="exploration", on_resume="keep")] = False
    """Random network distillation: an intrinsic reward for observations that a predictor doesn't know yet, for tasks
    whose own rewards are rare."""
    rnd_coef: Annotated[float, Setting(section="exploration", above=0)] = 0.5
    """Weight of the intrinsic advantage, against 1 for that of the rewards; the paper's weights are 1 and 2."""
    rnd_gamma: Annotated[float, Setting(section="exploration", at_least=0, at_most=1)] = 0.99
    """Discount factor of the intrinsic return, which goes on where episodes end."""
    rnd_proportion: Annotated[float, Setting(section="exploration", above=0, at_most=1)] = 0.25
    """Share of each minibatch that the predictor learns from."""

    network: Annotated[
        Literal["auto", "mlp", "cnn"], Setting(section="policy", chosen_at_start=True, on_resume="keep")
    ] = "auto"
    """`cnn`: the Nature CNN, for images of at least 36x36; `mlp`: for all other observations."""
    hidden_sizes: Annotated[tuple[int, ...], Setting(section="policy", at_least=1, on_resume="keep")] = (64, 64)
    """Widths of the MLP's hidden layers."""
    activation: Annotated[
        Literal["tanh", "relu", "elu", "gelu", "silu"], Setting(section="policy", on_resume="keep")
    ] = "tanh"
    """Activation of the MLP."""
    shared_trunk: Annotated[bool, Setting(section="policy", on_resume="keep")] = False
    """Share one MLP trunk, and its memory, between policy and value; the CNN's is always shared."""
    memory: Annotated[Literal["none", "lstm", "gru", "mingru"], Setting(section="policy", on_resume="keep")] = "none"
    """Recurrent layer between trunk and heads, for tasks in which one observation doesn't tell the state. `mingru`: the
    gates read only the input, so that a sequence is one parallel scan."""
    memory_size: Annotated[int, Setting(section="policy", at_least=1, unit="UNITS", on_resume="keep")] = 64
    """Units of the memory."""

    action_distribution: Annotated[
        Literal["gaussian", "squashed", "beta"], Setting(section="policy", on_resume="keep")
    ] = "gaussian"
    """Distribution of Box actions. `gaussian`: clipped to the bounds for the environment; `squashed`: the tanh of a
    Gaussian, scaled to the bounds; `beta`: a Beta distribution, scaled to the bounds."""
    state_dependent_std: Annotated[bool, Setting(section="policy", on_resume="keep")] = False
    """Let the network compute the log standard deviations of a Gaussian, squashed or not, from the observation; by
    default they are parameters of their own."""

    normalize_obs: Annotated[bool | None, Setting(section="normalisation", on_resume="keep")] = None
    """Normalise vector observations to mean 0 and variance 1 by running moments."""
    obs_clip: Annotated[float, Setting(section="normalisation", above=0, on_resume="keep")] = 10.0
    """Clip normalised observations to +- this value."""
    normalize_rewards: Annotated[bool | None, Setting(section="normalisation", on_resume="keep")] = None
    """Divide rewards by the running standard deviation of the discounted return."""
    reward_clip: Annotated[float, Setting(section="normalisation", above=0)] = 10.0
    """Clip normalised rewards to +- this value."""
    sign_rewards: Annotated[
        bool | None, Setting(section="normalisation", unset="True for ALE, else False", on_resume="keep")
    ] = None
    """Train on the sign of rewards (Atari's reward clipping); logged returns stay raw."""

    device: Annotated[
        str, Setting(section="device and speed", unit="DEVICE", changes="noise", chosen_at_start=True)
    ] = "auto"
    """Device to train on: `auto`, `cpu`, `cuda` or `cuda:K`."""
    act_device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Setting(section="device and speed", changes="noise", chosen_at_start=True),
    ] = "auto"
    """Device to act on when training on CUDA; `cpu` copies the policy before each rollout; `auto` takes the
    faster one, by measurement."""
    threads: Annotated[
        int | None,
        Setting(
            section="device and speed",
            at_least=1,
            at_most=1024,
            unset="by minibatch size",
            changes="noise",
            chosen_at_start=True,
        ),
    ] = None
    """CPU threads of torch, in fused runs of the C code. The number affects rounding; set it to repeat a run bit for
    bit."""
    compile: Annotated[
        Literal["auto", "fused", "on", "off", "graph"],
        Setting(section="device and speed", changes="noise", chosen_at_start=True),
    ] = "auto"
    """How rollout and update are made faster. `fused`: C for MLPs on a CPU, compiled in 2 s, or kernels on CUDA, and
    as `auto` where neither applies; `on`: torch.compile, which takes 10-20 s; `graph`: also capture; `auto`: `fused`
    where it applies, else `graph` on CUDA, and on a CPU `on` if the run is long enough to gain time."""
    precision: Annotated[Literal["fp32", "bf16"], Setting(section="device and speed")] = "fp32"
    """`bf16`: networks under bfloat16 autocast, losses in float32; worthwhile for wide networks on hardware with
    bf16. `fp32` uses TF32 matrix products on CUDA."""

    checkpoint_every: Annotated[
        int | None, Setting(section="checkpointing", at_least=1, unit="STEPS", unset="by time", changes="nothing")
    ] = None
    """Environment steps between checkpoints, in addition to --checkpoint-minutes."""
    checkpoint_minutes: Annotated[
        float, Setting(section="checkpointing", at_least=0, unit="MINUTES", changes="nothing")
    ] = 10.0
    """Minutes between checkpoints; 0 disables these. A run always saves one at its end, on Ctrl-C and on SIGTERM."""
    keep_checkpoints: Annotated[int, Setting(section="checkpointing", at_least=2, changes="nothing")] = 3
    """Checkpoints to keep, besides the best by evaluation."""
    resume: Annotated[Literal["never", "auto"], Setting(section="checkpointing", changes="nothing")] = "never"
    """`auto`: resume from the newest checkpoint in --run-dir, or in the latest runs/<env>/<name>-<seed>-..., if there
    is one; for jobs that may be restarted."""
    exact_resume: Annotated[bool, Setting(section="checkpointing", changes="nothing")] = False
    """Refuse to train unless a resumed run will continue bit for bit."""
    resume_envs: Annotated[Literal["auto", "restart"], Setting(section="checkpointing", changes="nothing")] = "auto"
    """Environments of a resumed run. `auto`: continue their episodes if possible, which is tested at the start;
    `restart`: start new episodes, so that checkpoints hold no environment state."""

    eval_every: Annotated[
        int | None, Setting(section="evaluation", at_least=1, unit="STEPS", unset="never", changes="nothing")
    ] = None
    """Environment steps between evaluations, which use their own environments and keep the best checkpoint."""
    eval_episodes: Annotated[int, Setting(section="evaluation", at_least=1, unit="EPISODES", changes="nothing")] = 10
    """Episodes per evaluation."""
    eval_max_steps: Annotated[int, Setting(section="evaluation", at_least=1, unit="STEPS", changes="nothing")] = 100_000
    """Maximum steps of an evaluation's episode, which is then cut; lower it for environments whose episodes never
    end."""

    log_every: Annotated[int, Setting(section="logging", at_least=1, unit="ITERATIONS", changes="nothing")] = 1
    """Iterations per line of metrics.jsonl and TensorBoard event, for long runs; each holds means over its
    iterations."""
    record_ratios: Annotated[
        int | None,
        Setting(section="logging", at_least=0, unit="ITERATIONS", unset="up to 20 per run", changes="nothing"),
    ] = None
    """Sample every N-th update for the report's ratio plots; 0 disables."""
    log_histograms: Annotated[bool, Setting(section="logging", changes="nothing")] = False
    """Log histograms of weights, gradients, actions and ratios of the sampled updates."""
    video_every: Annotated[
        int | None, Setting(section="logging", at_least=1, unit="STEPS", unset="never", changes="nothing")
    ] = None
    """Environment steps between videos of an episode, for TensorBoard (extra `video`)."""
    log_info: Annotated[tuple[str, ...], Setting(section="logging", unit="KEY [...]", changes="nothing")] = ()
    """Also log numbers under these keys of the environments' info, such as `success 'reward_terms/*'`: `info/KEY` is
    the mean over the steps of an iteration that have the key. `/` joins nested keys; `*` stands for any text."""
    track: Annotated[tuple[Literal["wandb", "mlflow"], ...], Setting(section="logging", changes="nothing")] = ()
    """Also log to these services (extras `wandb`, `mlflow`), configured by their environment variables."""

    def __post_init__(self) -> None:
        """Convert paths and whole numbers, check each field, and those combinations whose fields are given."""
        for name, hint in TYPES.items():
            object.__setattr__(self, name, _from_plain(getattr(self, name), hint))
        _check_types(self)
        _check_ranges(self)
        _check_combinations(self)

    @property
    def batch_size(self) -> int:
        """Rows of one rollout, n_envs x n_steps."""
        return _filled(self.n_envs) * _filled(self.n_steps)

    @property
    def minibatch_size(self) -> int:
        """Rows of one minibatch."""
        return self.batch_size // _filled(self.n_minibatches)

    def schedule(self, name: str) -> float | str:
        """Return the coefficient `name` as a number or a schedule, with `anneal_lr` and `anneal_clip` applied."""
        value: float | str | None = getattr(self, name)
        if value is None and name == "value_clip_coef":
            return self.schedule("clip_coef")
        if value is None and name == "target_kl":
            return math.inf
        short = {"learning_rate": self.anneal_lr, "clip_coef": self.anneal_clip}.get(name)
        if short and not isinstance(value, str):
            return f"linear:{value!r}:0"
        assert value is not None, f"{name} is open: call fill_defaults first"
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-able values, from which `from_dict` makes an equal config."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Config:
        """Return a config from plain values, as TOML and JSON hold them; `source` names their origin in messages.

        Raises:
            ConfigError: an unknown key (with the nearest known one), or anything the constructor refuses.
        """
        given: dict[str, Any] = {}
        for key, value in values.items():
            name = ALIASES.get(key.replace("-", "_"), key.replace("-", "_"))
            if name not in SETTINGS:
                near = difflib.get_close_matches(name, [*SETTINGS, *ALIASES], n=1)
                hint = f"did you mean {near[0]}?" if near else "see `fastppo train --help` for the settings."
                raise ConfigError(f"{source}: unknown setting {key!r}; {hint}")
            if name in given:
                raise ConfigError(f"{source}: {name} is given twice, once under an alias; keep one.")
            given[name] = value
        return cls(**given)

    @property
    def imported(self) -> list[str]:
        """Settings that name code of the user's own to import: an env_id with a module, wrappers outside Gymnasium."""
        found = [f"env_id {self.env_id}"] if ":" in self.env_id else []
        others = [name for name in self.wrappers if not name.startswith(("gymnasium.wrappers.", "gymnasium.wrappers:"))]
        return found + ([f"wrappers {' '.join(others)}"] if others else [])


def _take_aliases_and_profiles(cls: type[Config]) -> None:
    """Let the constructor of `cls` take the aliases of settings, and set what a profile sets and nothing else gives."""
    make = cls.__init__

    @functools.wraps(make)
    def init(self: Config, *args: Any, **values: Any) -> None:  # noqa: ANN401 - values of settings
        for alias, name in ALIASES.items():
            if alias in values:
                if name in values:
                    raise ConfigError(f"{name} is given twice, once under its alias {alias}; keep one.")
                values[name] = values.pop(alias)
        fields = [field.name for field in dataclasses.fields(cls)][len(args) :]
        profile = _profile_settings(values.get("profile"))
        # `fill_defaults` fills the settings that are None by default
        closed = {name: value for name, value in profile.items() if name in fields and DEFAULTS[name] is not None}
        make(self, *args, **closed | values)

    cls.__init__ = init  # type: ignore[method-assign]


TYPES = typing.get_type_hints(Config)
SETTINGS: dict[str, Setting] = {
    name: next(data for data in hint.__metadata__ if isinstance(data, Setting))
    for name, hint in typing.get_type_hints(Config, include_extras=True).items()
}
ALIASES = {setting.alias: name for name, setting in SETTINGS.items() if setting.alias}
_take_aliases_and_profiles(Config)
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}
SCHEDULED = tuple(name for name, setting in SETTINGS.items() if setting.scheduled)
CHOSEN_AT_START = tuple(name for name, setting in SETTINGS.items() if setting.chosen_at_start)
# A resumed run must keep these
FIXED = frozenset(name for name, setting in SETTINGS.items() if setting.fixed)
# A resumed run may have other values, and then differs from an uninterrupted one
NOTED = frozenset(name for name, s in SETTINGS.items() if s.changes != "nothing" and s.on_resume == "note")
# Runs that are equal in these are samples of one experiment
CHANGES_RESULTS = frozenset(name for name, setting in SETTINGS.items() if setting.changes == "results")


def _profile_settings(name: object) -> dict[str, Any]:
    """Return the settings of a profile that don't depend on the environment; none for a name that is no profile."""
    if not isinstance(name, str):  # refused later, with the setting's name
        return {}
    others: dict[str, dict[str, Any]] = {key: profile.settings for key, profile in PROFILES.items()}
    return (others | MEASURED).get(name, {})


def fill_defaults(
    config: Config,
    kind: Kind,
    *,
    atari: bool = False,
    reward_threshold: float | None = None,
    custom_memory: bool = False,
) -> Config:
    """Fill every setting that was not given.

    Args:
        config: settings as the user gave them.
        kind: of the environment: "image" by its observations, else "continuous" or "discrete" by its actions.
        atari: whether the environment is an ALE game; if so, sign_rewards is on by default.
        reward_threshold: the environment's own, for `target_return="threshold"`.
        custom_memory: whether the policy is a module of the user's own, with memory.

    Returns:
        A config in which None only stands where it means "none" (target_kl, target_return, ...).

    Raises:
        ConfigError: n_minibatches doesn't divide the batch, or settings contradict each other.
    """
    defaults = CLEANRL[kind] | {"sign_rewards": atari}
    if config.profile in MEASURED:
        defaults |= TUNED.get(config.env_id, {})
    elif config.profile != "cleanrl":  # which is CLEANRL, by kind
        profile = _profile_settings(config.profile)
        rows = profile.pop("minibatch_size", None)
        defaults |= {name: value for name, value in profile.items() if DEFAULTS[name] is None}
        if rows is not None:
            n_envs, n_steps = (getattr(config, name) or defaults[name] for name in ("n_envs", "n_steps"))
            defaults["n_minibatches"] = _largest_divisor(n_envs * n_steps, max(1, n_envs * n_steps // rows))
    # a schedule replaces the short form
    if isinstance(config.learning_rate, str):
        defaults["anneal_lr"] = False
    if isinstance(config.clip_coef, str):
        defaults["anneal_clip"] = False
    if config.normalize_rewards:
        defaults["sign_rewards"] = False
    if config.sign_rewards:
        defaults["normalize_rewards"] = False
    changes = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.target_return == "threshold":
        changes["target_return"] = reward_threshold
    if "n_minibatches" in changes and (custom_memory or config.memory != "none"):
        whole = dataclasses.replace(config, **changes | {"n_minibatches": 1})
        sequences = whole.batch_size // (config.segment_length or _filled(whole.n_steps))
        changes["n_minibatches"] = _largest_divisor(max(1, sequences), changes["n_minibatches"])
    return dataclasses.replace(config, **changes)


def count_iterations(config: Config, processes: int) -> int:
    """Return the number of whole iterations of a filled config; an iteration is one rollout on each process.

    Raises:
        ConfigError: there is none.
    """
    steps, batch = _filled(config.total_timesteps), config.batch_size * processes
    if steps < batch:
        ranks = f" on each of {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"total_timesteps={steps:,} is less than one iteration of {batch:,} steps (n_envs={config.n_envs:,} x "
            f"n_steps={config.n_steps:,}{ranks}); train for at least {batch:,} steps, or reduce n_envs or n_steps."
        )
    return steps // batch


def differences_from_defaults(config: Config, kind: Kind, *, atari: bool = False) -> str:
    """Return the settings of a filled config that differ from CleanRL's for this kind of environment, on one line.

    Environment and seed come first, always. Left out are the run folder, and choices that the default leaves to the
    machine (device, threads, ...).
    """
    defaults = fill_defaults(Config(), kind, atari=atari)
    left_open = {name for name in CHOSEN_AT_START if getattr(defaults, name) in (None, "auto")}
    names = [name for name in SETTINGS if name not in left_open | {"env_id", "seed", "run_dir"}]
    differing = [name for name in names if getattr(config, name) != getattr(defaults, name)]
    return "  ".join(f"{name}={shown(getattr(config, name))}" for name in ("env_id", "seed", *differing))


def shown(value: object) -> str:
    """Return the value of a setting as a user types it; None and empty values as "none"."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, dict) and value:
        return json.dumps(value)
    if isinstance(value, (tuple, list)) and value:
        return " ".join(map(str, value))
    if isinstance(value, int):
        return f"{value:_}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value) if value else "none"


def default_text(name: str, value: object) -> str:
    """Return the default `value` of a setting in words; where it is None, by the kind of environment."""
    if value is not None:
        return shown(value)
    if (unset := SETTINGS[name].unset) is not None:
        return unset
    text, *others = (shown(CLEANRL[kind][name]) for kind in ("discrete", "image", "continuous"))
    names = zip(("images", "Box"), others, strict=True)
    return "; ".join([text, *(f"{kind}: {other}" for kind, other in names if other != text)])


def load_toml(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML file.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))  # some editors begin a file with a byte order mark
    except OSError as error:
        raise ConfigError(f"--config {path}: can't be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not TOML ({error}).") from None


def parse_schedule(text: str, name: str = "schedule") -> tuple[str, float, float]:
    """Parse `linear:A:B`, `cosine:A:B` or `constant:A` into (shape, start, end).

    Raises:
        ConfigError: any other text; `name` names the setting.
    """
    shape, *numbers = text.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if shape == "constant" and len(values) == 1:
        return shape, values[0], values[0]
    if shape in ("linear", "cosine") and len(values) == 2:
        return shape, values[0], values[1]
    adaptive = ", or adaptive:3e-4:1e-5:1e-2" if name == "learning_rate" else ""
    raise ConfigError(
        f"{name}={text!r} is neither a number nor a schedule; "
        f"use 2.5e-4, constant:2.5e-4, linear:2.5e-4:0 or cosine:2.5e-4:0{adaptive}."
    )


def parse_adaptive_rate(value: object) -> tuple[float, float, float] | None:
    """Parse `adaptive:START:LOWEST:HIGHEST` into its three learning rates; None for any other value.

    Raises:
        ConfigError: these are not three rates with 0 < LOWEST <= START <= HIGHEST.
    """
    if not isinstance(value, str) or value.partition(":")[0] != "adaptive":
        return None
    try:
        start, lowest, highest = map(float, value.split(":")[1:])
    except ValueError:
        start, lowest, highest = math.nan, math.nan, math.nan
    if not 0 < lowest <= start <= highest < math.inf:
        raise ConfigError(
            f"learning_rate={value!r} must be adaptive:START:LOWEST:HIGHEST with 0 < LOWEST <= START <= HIGHEST, such "
            "as adaptive:3e-4:1e-5:1e-2."
        )
    return start, lowest, highest


def _filled(value: int | None) -> int:
    assert value is not None, "this config has open settings: call fill_defaults first"
    return value


def _from_plain(value: object, hint: object) -> object:
    """Return a value of TOML, JSON or Python as the type that Config uses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, list) and origin is tuple:
        value = tuple(value)
    if isinstance(value, tuple) and origin is tuple:
        return tuple(_from_plain(item, args[0]) for item in value)
    if isinstance(value, str) and Path in args:
        return Path(value)
    if int in (hint, *args) and isinstance(value, float) and value.is_integer():  # 1e6 is a float in TOML and Python
        return int(value)
    if isinstance(value, (bool, int, float)):
        return value
    if int in (hint, *args) and isinstance(value, numbers.Integral):  # numpy's, as a sweep draws them
        return int(value)
    if float in (hint, *args) and isinstance(value, numbers.Real):
        return float(value)
    return value


def _accepts(value: object, hint: object) -> bool:
    """Return whether a plain value fits one of the annotations that Config uses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_accepts(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_accepts(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.cast("type", hint))


def _choices(hint: object) -> list[str]:
    """Return every text that an annotation's Literals allow."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return list(args)
    return [choice for arg in args for choice in _choices(arg)]


def _describe(hint: object) -> str:
    """Return an annotation in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if origin is dict:
        return 'a table of keyword arguments, as JSON: {"gravity": 9.81}'
    return "a path" if hint is Path else "text" if hint is str else str(getattr(hint, "__name__", hint))


def _check_types(config: Config) -> None:
    try:
        json.dumps(config.env_kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"env_kwargs={config.env_kwargs!r} can't be stored as JSON ({error}); use plain values."
        ) from None
    for name, hint in TYPES.items():
        value = getattr(config, name)
        if not _accepts(value, hint):
            near = ""
            if isinstance(value, str):
                match = difflib.get_close_matches(value, _choices(hint), n=1)
                near = f"; did you mean {match[0]}?" if match else ""
            raise ConfigError(f"{name}={value!r} must be {_describe(hint)}{near or '.'}")


def _check_number(name: str, given: object, number: float) -> None:
    setting = SETTINGS[name]
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


def _check_ranges(config: Config) -> None:
    for name, setting in SETTINGS.items():
        value = getattr(config, name)
        if isinstance(value, str):
            adaptive = parse_adaptive_rate(value) if name == "learning_rate" else None
            numbers = adaptive or (parse_schedule(value, name)[1:] if setting.scheduled else ())
        else:
            numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, (int, float)):
                _check_number(name, list(value) if isinstance(value, tuple) else value, number)
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
    for name in ("run_dir", "init_from"):
        if "\0" in str(getattr(config, name)):
            raise ConfigError(f"{name}={str(getattr(config, name))!r} holds a null character, which no path can.")
    device = config.device.split(":")
    if (
        device[0] not in ("auto", "cpu", "cuda")
        or len(device) > 2
        or (len(device) == 2 and not (device[0] == "cuda" and device[1].isdecimal()))
    ):
        raise ConfigError(f"device={config.device!r} must be auto, cpu, cuda or cuda:K.")


def _check_combinations(config: Config) -> None:
    if config.anneal_lr and isinstance(config.learning_rate, str):
        raise ConfigError(f"anneal_lr and learning_rate={config.learning_rate!r} both give a schedule; keep one.")
    _check_followers_of_the_kl(config)
    for name in ("rnd_coef", "rnd_gamma", "rnd_proportion"):
        if not config.rnd and getattr(config, name) != DEFAULTS[name]:
            raise ConfigError(
                f"{name}={getattr(config, name)!r} has no effect without --rnd; add it, or leave {name} out."
            )
    if config.anneal_clip and isinstance(config.clip_coef, str):
        raise ConfigError(f"anneal_clip and clip_coef={config.clip_coef!r} both give a schedule; keep one.")
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
    if config.vectorization != "pool" and (config.workers or config.half_batches):
        name = "workers" if config.workers else "half_batches"
        raise ConfigError(
            f"{name} needs vectorization=pool, but vectorization={config.vectorization}; leave it out or use the pool."
        )
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
    if config.log_info and config.vectorization == "tensor":
        raise ConfigError(
            "log_info with vectorization=tensor: these environments give no info; use sync, pool or async, or leave it "
            "out."
        )
    if config.critic_obs_keys and config.shared_trunk:
        raise ConfigError(
            "critic_obs_keys with shared_trunk: the policy would read them through the shared layers; leave one out."
        )
    if both := set(config.obs_keys) & set(config.critic_obs_keys):
        raise ConfigError(f"obs_keys and critic_obs_keys both name {min(both)!r}; the critic reads both lists.")
    if config.half_batches and config.n_envs == 1:
        raise ConfigError("half_batches=True with n_envs=1: one environment can't be split; leave it out.")
    if None in (config.n_envs, config.n_steps, config.n_minibatches):
        return
    if config.memory != "none":
        check_sequences(config)
        return
    batch, parts = config.batch_size, _filled(config.n_minibatches)
    if batch % parts:
        raise ConfigError(
            f"n_minibatches={parts} does not divide the batch of {batch} "
            f"(n_envs={config.n_envs} x n_steps={config.n_steps}); nearest that do: "
            f"{_nearest_divisors(batch, parts)}."
        )


def _check_followers_of_the_kl(config: Config) -> None:
    """Check the settings of an adaptive learning rate and of a penalty on the KL."""
    rate = config.learning_rate
    if rate is None:
        rate = _profile_settings(config.profile).get("learning_rate")
    adaptive, penalty = parse_adaptive_rate(rate) is not None, config.objective != "clip"
    for name, used, by in (
        ("adaptive_kl", adaptive, "an adaptive learning rate: --learning-rate adaptive:3e-4:1e-5:1e-2"),
        ("kl_coef", penalty, "a penalty: --objective penalty or clip_and_penalty"),
        ("penalty_kl", penalty, "a penalty: --objective penalty or clip_and_penalty"),
    ):
        if not used and getattr(config, name) != DEFAULTS[name]:
            raise ConfigError(f"{name}={getattr(config, name)!r} has no effect without {by}; or leave it out.")
    if (adaptive or penalty) and (config.update_epochs, config.n_minibatches) == (1, 1):
        name = f"objective={config.objective}" if penalty else f"learning_rate={config.learning_rate!r}"
        raise ConfigError(
            f"{name} with update_epochs=1 and n_minibatches=1: the only step of an update starts from the policy that "
            "acted, so the KL is always 0; use more epochs or minibatches."
        )


def check_sequences(config: Config) -> None:
    """Check that the rollouts of a filled config can be cut into sequences, and these into minibatches.

    Raises:
        ConfigError: they can't.
    """
    n_steps, parts = _filled(config.n_steps), _filled(config.n_minibatches)
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
    below = _largest_divisor(whole, part)
    above = next((d for d in range(part, whole + 1) if whole % d == 0), None)
    return f"{below}, {above}" if above else f"{below}"


def _largest_divisor(whole: int, at_most: int) -> int:
    return max(d for d in range(1, min(at_most, whole) + 1) if whole % d == 0)
