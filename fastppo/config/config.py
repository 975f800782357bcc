"""Every setting of a run: one flat, frozen dataclass whose fields are the command line's flags.

Range checks, schedules, the settings a resume must keep, the grouping of seeds in reports, `--help` and
docs/settings.md are derived from the metadata of the fields (`Setting`).

A field that is None is not given: `fill_defaults` fills it by the kind of environment (CleanRL's `ppo.py` for vectors
and discrete actions, `ppo_atari.py` for images, `ppo_continuous_action.py` for Box actions) or from a profile. Filling
a filled config changes nothing, so a run folder stores exactly the settings that ran. A profile's other settings are
set by the constructor, under those that are given.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fastppo.config.checks import check_combinations, check_ranges, check_texts, check_types
from fastppo.config.flag_types import EnvKwargs, TargetReturn
from fastppo.config.plain_values import from_plain
from fastppo.config.setting import SearchValues, Setting, known
from fastppo.errors import ConfigError
from fastppo.profiles import ProfileName, profile_settings


def _by_name(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return `values` under the names of settings; keys may be aliases and have dashes.

    Raises:
        ConfigError: an unknown key, or a setting that is given twice; the text names `source`.
    """
    given: dict[str, Any] = {}
    for key, value in values.items():
        plain = str(key).replace("-", "_")
        name = ALIASES.get(plain, plain)
        if name not in SETTINGS and isinstance(value, Mapping):
            raise ConfigError(
                f"{source}: [{key}] is a table, but settings have no groups; put its lines at the top, without [{key}]."
            )
        if name not in SETTINGS:
            near = difflib.get_close_matches(name.lower(), [*SETTINGS, *ALIASES], n=1)
            hint = f"did you mean {near[0]}?" if near else "see `fastppo train --help` for the settings."
            raise ConfigError(f"{source}: unknown setting {key!r}; {hint}")
        if name in given:
            raise ConfigError(f"{source}: {name} is given twice, once under an alias; keep one.")
        given[name] = value
    return given


def _take_aliases_and_profiles(cls: type[Config]) -> type[Config]:
    """Let the constructor of `cls` take the aliases of settings, and set what a profile sets and nothing else gives."""
    make = cls.__init__

    @functools.wraps(make)
    def init(self: Config, *args: Any, **values: Any) -> None:  # noqa: ANN401 - values of settings
        given = _by_name(values, "Config")
        fields = list(SETTINGS)[len(args) :]
        profile = profile_settings(given.get("profile"))
        # `fill_defaults` fills the settings that are None by default
        closed = {name: value for name, value in profile.items() if name in fields and DEFAULTS[name] is not None}
        make(self, *args, **closed | given)

    cls.__init__ = init  # type: ignore[method-assign]
    return cls


@_take_aliases_and_profiles
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
            object.__setattr__(self, name, from_plain(name, getattr(self, name), hint))
        check_types(self, TYPES)
        check_ranges(self, SETTINGS)
        check_texts(self)
        check_combinations(self, DEFAULTS)

    @property
    def batch_size(self) -> int:
        """Rows of one rollout, n_envs x n_steps."""
        return known(self.n_envs) * known(self.n_steps)

    @property
    def minibatch_size(self) -> int:
        """Rows of one minibatch."""
        return self.batch_size // known(self.n_minibatches)

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
        given = _by_name(values, source)
        try:
            return cls(**given)
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None

    @property
    def imported(self) -> list[str]:
        """Settings that name code of the user's own to import: an env_id with a module, wrappers outside Gymnasium."""
        found = [f"env_id {self.env_id}"] if ":" in self.env_id else []
        others = [name for name in self.wrappers if not name.startswith(("gymnasium.wrappers.", "gymnasium.wrappers:"))]
        return found + ([f"wrappers {' '.join(others)}"] if others else [])


TYPES = typing.get_type_hints(Config)
SETTINGS: dict[str, Setting] = {
    name: next(data for data in hint.__metadata__ if isinstance(data, Setting))
    for name, hint in typing.get_type_hints(Config, include_extras=True).items()
}
ALIASES = {setting.alias: name for name, setting in SETTINGS.items() if setting.alias}
DEFAULTS = {field.name: field.default for field in dataclasses.fields(Config)}
SCHEDULED = tuple(name for name, setting in SETTINGS.items() if setting.scheduled)
CHOSEN_AT_START = tuple(name for name, setting in SETTINGS.items() if setting.chosen_at_start)
# A resumed run must keep these
FIXED = frozenset(name for name, setting in SETTINGS.items() if setting.fixed)
# A resumed run may have other values, and then differs from an uninterrupted one
NOTED = frozenset(name for name, s in SETTINGS.items() if s.changes != "nothing" and s.on_resume == "note")
# Runs that are equal in these are samples of one experiment
CHANGES_RESULTS = frozenset(name for name, setting in SETTINGS.items() if setting.changes == "results")
